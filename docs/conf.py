import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from types import ModuleType

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

about = metadata("torch-worm-optim")

project = "torch_worm_optim"
author = "The torch_worm_optim authors"
copyright = "The torch_worm_optim authors"
version = release = about["Version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"torch_worm_optim {release}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_html_meta = {"description lang=en": about["Summary"]}
myst_update_mathjax = False

# Prompts and outputs are not copied.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of named tuples once, not again as members

# Blocks within a page share their names, pages do not. Messages of errors are checked, too.
doctest_global_setup = """
import torch
from torch import nn
"""
doctest_default_flags = __import__("doctest").ELLIPSIS | __import__("doctest").NORMALIZE_WHITESPACE

# Our own names are all checked. Names of torch and of the standard library are not: their
# inventories are on the web, and these pages build without it.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|numpy|collections|re|enum)\..+"),
    ("py:class", r"Tensor|Optimizer|Closure|Callable|Sequence|Mapping|Iterable|Any|Axes"),
    ("py:.*", r"(lightning|transformers)\..+"),
    ("py:class", r"Trainer\w*|TrainingArguments|LightningModule|Callback"),
    ("py:class", r"optional|callable"),  # words of "Args:" sections that are not types
    ("py:class", r"Kept"),  # indices that stay in each dimension, which ShrinkReport describes
]


# The pages of callbacks are built without their trainers, too: empty classes of the same names, for
# nothing but to be inherited from. autodoc_mock_imports would take the signatures away.
class StandIn(ModuleType):
    """A module that has every class one asks for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


for trainer, module in [("lightning", "lightning.pytorch"), ("transformers", "transformers")]:
    if find_spec(trainer) is None:
        sys.modules[module] = StandIn(module)


# Browsers read MathML, and docutils writes it: no script, and nothing to load from elsewhere.
html_math_renderer = "mathml"


def write_mathml(writer, node):
    """Write a formula as MathML. It raises on what it does not know."""
    is_block = isinstance(node, nodes.math_block)
    formula = node.astext().replace(r"\dots", r"\ldots")  # docutils knows the latter only
    mathml = tex2mathml(formula, as_block=is_block)
    writer.body.append(f'<div class="math">{mathml}</div>' if is_block else mathml)
    raise nodes.SkipNode


def setup(app):
    """Let Sphinx know the renderer of formulas."""
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
