"""The documents as pages: ``sphinx-build -W docs docs/_build``. The tutorial is executed."""

import casn_plugin

project = "casn-plugin"
author = copyright = "the casn-plugin authors"
version = release = casn_plugin.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "casn-plugin"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
