"""Rendered pedestrians: people, cameras and a data set of pictures that needs no download.

The public face of the wing, which imports nothing else of the package. From the bottom: colours,
looks (who the people are), cameras, surfaces, solids, body, street, picture, and the data set on
disk. A picture is ray-cast from about twenty-five tapered solids posed in a walk, lit, laid over a
crop of the street and passed through the camera's response.
"""

from casn_plugin.pedestrians.dataset import PedestrianSet, load_pedestrians, mask_path
from casn_plugin.pedestrians.picture import contact_sheet, render_pedestrian

__all__ = ["PedestrianSet", "contact_sheet", "load_pedestrians", "mask_path", "render_pedestrian"]
