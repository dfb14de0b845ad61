"""The documents as pages: ``sphinx-build -W -n docs docs/_build``. The notebook is executed."""

import importlib
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext import autosummary
from sphinx.ext.napoleon import GoogleDocstring

import casn_plugin

project = "casn-plugin"
author = copyright = "the casn-plugin authors"
version = release = casn_plugin.__version__
language = "en-GB"
smartquotes_action = "De"  # not of quotes, which stand in types
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "code"  # `name` in a docstring
nitpicky = True
# what other libraries document, rooms inside of a wing, shapes, and letters that stand for a type
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|nn|PIL|matplotlib|pandas|torchreid|jaxtyping|pathlib|typing)\..*"),
    ("py:.*", r"(collections|contextlib|enum|abc|types|argparse|os|concurrent|filelock)\..*"),
    ("py:.*", r"casn_plugin\.(ranking|explanation|pedestrians)\.\w+\.\w+.*"),
    ("py:class", r"'.*'|Tensor|ndarray|Figure|GraphModule|Path"),
    ("py:class", r"casn_plugin\.\w+\.(T|Manager|Function|Settings)"),
]

html_theme = "furo"
html_title = "casn-plugin"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["pages.js"]
html_math_renderer = "mathml"
html_show_sourcelink = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
napoleon_use_ivar = True

myst_enable_extensions = ["amsmath", "dollarmath", "attrs_block", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True

PUBLIC = {id(getattr(casn_plugin, name)) for name in casn_plugin.__all__}


def in_its_room_too(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out of a room what is documented as a name of the package."""
    return True if what == "module" and id(value) in PUBLIC else None


def said_in_words(self: GoogleDocstring) -> list[str]:
    """Reads what documents an attribute as any docstring: words before a colon are no type."""
    return GoogleDocstring(self._consume_to_end(), self._config, what="function").lines()


def find_by_its_end(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: nodes.Element
) -> nodes.Element | None:
    """Finds ``CASN.encode`` from any room, where one documented name alone ends with it."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removeprefix("casn_plugin.ranking.")
    found = {
        (entry.docname, entry.node_id)
        for name, entry in env.get_domain("py").objects.items()
        if f".{name}".endswith(f".{target}")
    }
    if len(found) != 1:
        return None
    ((page, anchor),) = found
    uri = f"{app.builder.get_relative_uri(node['refdoc'], page)}#{anchor}"
    return nodes.reference("", "", contents, internal=True, refuri=uri)


def inline_math(self: Any, node: nodes.math) -> None:
    """Writes a formula in a line as MathML, which browsers show by themselves."""
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def displayed_math(self: Any, node: nodes.math_block) -> None:
    """Writes a formula that stands alone as MathML."""
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    self.body.append(f'<div class="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Joins in where Sphinx asks."""
    importlib.import_module("casn_plugin.engine")
    app.connect("autodoc-skip-member", in_its_room_too)
    autosummary.WELL_KNOWN_ABBREVIATIONS += ("Eq.",)
    GoogleDocstring._parse_attribute_docstring = said_in_words  # type: ignore[method-assign]
    app.connect("missing-reference", find_by_its_end)
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
