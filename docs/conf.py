from importlib.metadata import version as installed_version

project = "torch_worm_optim"
author = "The torch_worm_optim authors"
copyright = "The torch_worm_optim authors"
version = release = installed_version("torch-worm-optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"torch_worm_optim {release}"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

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
    ("py:class", r"Tensor|Optimizer|Closure|Callable|Sequence|Mapping|Iterable|Any"),
    ("py:.*", r"(lightning|transformers)\..+"),
    ("py:class", r"Trainer\w*|TrainingArguments|LightningModule|Callback"),
    ("py:class", r"optional|callable"),  # words of "Args:" sections that are not types
]
