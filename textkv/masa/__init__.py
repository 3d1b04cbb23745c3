"""MASA: attention weights as combinations of matrix atoms that layers share (arXiv 2508.04581).

    share(model, Sharing(atoms=4))            # a fresh model, to be trained
    convert(model, Conversion(atoms=1, groups=5, reduction=0.2), rows)    # a pretrained one, without training
    save(model, "folder"); load("folder")     # on disk, each atom once
    export(model)                             # plain weights again

It makes parameters fewer, not the cache: keys and values are those of an ordinary model, so every cache method works on
top of it.
"""

from textkv.masa.checkpoint import load, save
from textkv.masa.conversion import Conversion, Converted, Plan, convert, plan
from textkv.masa.mixture import Mixture, attach, export, groups_of
from textkv.masa.pca import matrix_pca
from textkv.masa.sharing import Sharing, parameters_of, share
from textkv.models.atoms import AtomGroup

__all__ = [
    "AtomGroup",
    "Conversion",
    "Converted",
    "Mixture",
    "Plan",
    "Sharing",
    "attach",
    "convert",
    "export",
    "groups_of",
    "load",
    "matrix_pca",
    "parameters_of",
    "plan",
    "save",
    "share",
]
