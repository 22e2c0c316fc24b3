"""How Sphinx builds the documentation: ``python -m sphinx -W --keep-going docs build/docs``.

Links into the documentation of Python, torch, Lightning, Flower and NumPy need their lists of names (``objects.inv``),
which are on the network. A build that must pass without one makes no such links: their names are plain text then, and
nothing warns. ``LIGHTNING_FED_INTERSPHINX=1`` in the environment fetches the lists; one that cannot be fetched is then
an error. ``LIGHTNING_FED_INTERSPHINX=FOLDER`` takes them from files there (``torch.inv``, ...).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning_fed

project = "lightning_fed"
author = "The lightning_fed authors"
copyright = author
release = version = lightning_fed.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"lightning_fed {release}"
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3
# Prompts and outputs of sessions are not copied.
copybutton_prompt_text = ">>> |... |\\$ "
copybutton_prompt_is_regexp = True

napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

_SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "flwr": "https://flower.ai/docs/framework/",
    "numpy": "https://numpy.org/doc/stable/",
}
_lists = os.environ.get("LIGHTNING_FED_INTERSPHINX", "")
intersphinx_mapping = (
    {name: (site, None if _lists == "1" else f"{_lists}/{name}.inv") for name, site in _SITES.items()} if _lists else {}
)
intersphinx_timeout = 20

# Where a class is defined -> where its own documentation lists it.
_LISTED = {
    "lightning.pytorch.core.module.LightningModule": "lightning.pytorch.core.LightningModule",
    "lightning.pytorch.core.datamodule.LightningDataModule": "lightning.pytorch.core.LightningDataModule",
    "lightning.pytorch.callbacks.callback.Callback": "lightning.pytorch.callbacks.Callback",
    "lightning.pytorch.callbacks.progress.tqdm_progress.TQDMProgressBar": "lightning.pytorch.callbacks.TQDMProgressBar",
    "lightning.pytorch.callbacks.progress.rich_progress.RichProgressBar": "lightning.pytorch.callbacks.RichProgressBar",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch._tensor.Tensor": "torch.Tensor",
    "flwr.app.message.message.Message": "flwr.app.Message",
    "flwr.clientapp.client_app.ClientApp": "flwr.clientapp.ClientApp",
    "flwr.serverapp.grid.grid.Grid": "flwr.serverapp.Grid",
    "flwr.serverapp.server_app.ServerApp": "flwr.serverapp.ServerApp",
    "flwr.serverapp.strategy.strategy.Strategy": "flwr.serverapp.strategy.Strategy",
    "flwr.serverapp.strategy.fedavg.FedAvg": "flwr.serverapp.strategy.FedAvg",
}


def _as_listed(app, env, node, contnode):
    """Let intersphinx, which comes after this, look for a class under the name that its documentation has."""
    node["reftarget"] = _LISTED.get(node.get("reftarget"), node.get("reftarget"))


def setup(app):
    """Connect what is above; called by Sphinx."""
    app.connect("missing-reference", _as_listed, priority=400)
