"""How Sphinx builds these pages: `make docs`."""

from importlib.metadata import version as installed

project = "perturbprob"
author = "perturbprob contributors"
copyright = author
version = release = installed("perturbprob")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"perturbprob {release}"

nb_execution_mode = "off"  # notebooks are executed by the tests and committed with their outputs
myst_enable_extensions = ["dollarmath", "deflist"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
