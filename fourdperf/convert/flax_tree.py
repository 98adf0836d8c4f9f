"""Parameter trees of Flax models: an orbax folder, a `.msgpack` file of flax.serialization, or an `.npz`; no pickles.

A tree is read as arrays by path, "kernel_net_0/linear/kernel". Reading msgpack and orbax needs `fourdperf[jax]`.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fourdperf.convert.npz import open_npz, write_npz
from fourdperf.convert.table import Row
from fourdperf.data.files import write_bytes
from fourdperf.models.checkpoint import CheckpointError, PretrainedModel, check_keys, load_weights, read_config
from fourdperf.models.config import BaseConfig

SUFFIXES = (".msgpack", ".npz", ".orbax")
# Where a training state, or what wraps it, keeps the parameters. A model may have a part of one of these names.
WRAPPERS = ("state", "train_state", "model")
# One of these lies beside the arrays in a folder of orbax: in that of the present format, and of the one before.
ORBAX = ("_METADATA", "checkpoint")


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint of orbax, or a CheckpointManager's folder of numbered ones."""
    return _orbax_item(Path(path)) is not None


def read_parameters(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The parameters of a file or folder by path; of a manager's folder, those of the latest step.

    Below `params`, or `state/params` and the like (WRAPPERS), nothing else of a training state is looked at. Raises
    CheckpointError for what is no such checkpoint, is damaged, or has other leaves than floating arrays; ImportError
    without flax or orbax; OSError where it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        tree = _read_orbax(path)
    elif path.suffix == ".npz":
        with open_npz(path) as npz:
            tree = nested({name: npz.read(name) for name in npz.shapes}, path)
    else:
        tree = _read_msgpack(path)
    tree = _unwrapped(tree)
    if not isinstance(tree, Mapping) or not tree:
        raise CheckpointError(f"{path}: expected a tree of parameters, got {type(tree).__name__}")
    arrays = flat(tree)
    for name, x in arrays.items():
        # bfloat16 is no number type of NumPy's own
        if not isinstance(x, np.ndarray) or not (np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16"):
            raise CheckpointError(f"{path}: {name}: expected a floating array, got {getattr(x, 'dtype', type(x))}")
    return arrays


def write_parameters(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `{"params": tree}` as the suffix says; an `.orbax` is a folder, which must not be there.

    Raises ValueError for another suffix, OSError where the disk refuses.
    """
    _check_suffix(path)
    path = Path(path)
    if path.suffix == ".npz":
        write_npz(path, ((f"params/{name}", x) for name, x in arrays.items()))
        return
    tree = {"params": nested(arrays, path)}
    if path.suffix == ".msgpack":
        from flax import serialization

        write_bytes(path, serialization.msgpack_serialize(tree))
        return
    import orbax.checkpoint as ocp

    if path.exists():
        raise FileExistsError(f"{path}: expected no such folder yet")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


class TreeFormat(NamedTuple):
    """How a family of Flax models is stored, in the names of another project.

    MODEL, config: the family's name, and its config's class. model: ours of a config. table: its rows. infer_config: the
    config of a tree, from names and shapes of arrays and from fields that are given. warning: what of a model of ours
    the other project would not do, in words, or nothing.
    """

    MODEL: str
    config: type[BaseConfig]
    model: Callable[[BaseConfig], PretrainedModel]
    table: Callable[[BaseConfig], list[Row]]
    infer_config: Callable[[Mapping[str, tuple[int, ...]], Mapping | None], BaseConfig]
    warning: Callable[[PretrainedModel], str] = lambda model: ""

    def load_tree(
        self, arrays: Mapping[str, np.ndarray], overrides: Mapping | None = None, where: str = "tree"
    ) -> PretrainedModel:
        """A model of ours, in eval mode, from arrays by path; errors as in `load`, with `where` as the file."""
        shapes = {name: tuple(x.shape) for name, x in arrays.items()}
        try:
            config = self.infer_config(shapes, overrides)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        rows = self.table(config)
        check_keys(where, {name: shape for row in rows for name, shape in row.sources}, shapes)
        with torch.device("meta"):
            model = self.model(config)
        model.load_state_dict(packed(rows, arrays), assign=True)
        return model.eval()

    def load(self, path: str | os.PathLike, overrides: Mapping | None = None) -> PretrainedModel:
        """A model from a file or folder of this module, in eval mode; `overrides` as in `infer_config`.

        Raises CheckpointError (a ValueError) that names the file and every key that is missing, unknown or misshapen.
        """
        return self.load_tree(read_parameters(path), overrides, str(path))

    def convert(
        self, path: str | os.PathLike, out_dir: str | os.PathLike, *, overrides: Mapping | None = None
    ) -> BaseConfig:
        """Convert to a directory for `from_pretrained`; returns the config; errors as in `load`."""
        model = self.load(path, overrides)
        model.save_pretrained(out_dir)
        return model.config

    def export(self, directory: str | os.PathLike, path: str | os.PathLike) -> None:
        """The inverse of `convert`, bit for bit: `{"params": tree}` in the form that the suffix of `path` says.

        Warns where the other project would compute something else with these arrays; the mirrors in fourdperf.jax do
        not. Raises CheckpointError as `from_pretrained` does; ValueError for another suffix; OSError where the disk
        refuses.
        """
        _check_suffix(path)
        config = self.config.from_dict(read_config(directory, self.MODEL))
        with torch.device("meta"):
            model = self.model(config)
        load_weights(model, directory)
        if warning := self.warning(model):
            warnings.warn(f"{directory}: {warning}", stacklevel=2)
        write_parameters(path, unpacked(self.table(config), model.state_dict()))


def _check_suffix(path: str | os.PathLike) -> None:
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def nested(arrays: Mapping[str, np.ndarray], where: object = "tree") -> dict:
    """The inverse of `flat`."""
    tree = {}
    for key, value in arrays.items():
        *path, last = key.split("/")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{where}: {key}: expected no array above it")
        node[last] = np.ascontiguousarray(value)
    return tree


def packed(rows: list[Row], arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Flax's arrays as our tensors, by a table; each a copy of its own, in the dtype that the file has."""
    return {row.key: _tensor(row.pack([arrays[name] for name, _ in row.sources])) for row in rows}


def unpacked(rows: list[Row], state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Our tensors as Flax's arrays; bfloat16 becomes float32, without loss."""
    return {
        name: part
        for row in rows
        for (name, _), part in zip(row.sources, row.unpack(_array(state[row.key])), strict=True)
    }


def _unwrapped(tree: Any) -> Any:
    """What lies below `params`, reached through WRAPPERS; the tree itself where that leads nowhere."""
    if not isinstance(tree, Mapping):
        return tree
    if isinstance(tree.get("params"), Mapping):
        inner = tree["params"]
        return _unwrapped(inner) if isinstance(inner.get("params"), Mapping) else inner
    below = ((tree[name], _unwrapped(tree[name])) for name in WRAPPERS if name in tree)
    return next((found for inner, found in below if found is not inner), tree)


def _tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x, order="C"))


def _array(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def _read_msgpack(path: Path) -> Any:
    import msgpack
    from flax import serialization

    content = path.read_bytes()
    try:
        return serialization.msgpack_restore(content)
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path}: not a complete file of flax.serialization: {error or 'it is empty'}") from error


def _read_orbax(path: Path) -> Any:
    item = _orbax_item(path)
    if item is None:
        raise CheckpointError(f"{path}: not a folder of orbax, which has one of {', '.join(ORBAX)}")
    import jax
    import orbax.checkpoint as ocp

    # Onto the host, whatever devices it was written from.
    args = lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray if hasattr(leaf, "shape") else None)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(item.absolute()).item_metadata.tree
            return checkpointer.restore(item.absolute(), restore_args=jax.tree.map(args, tree))
    except Exception as error:  # of whatever kind: orbax, tensorstore and json each have their own
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged orbax checkpoint: {line[:300]}") from error


def _orbax_item(path: Path) -> Path | None:
    """The folder with the arrays: itself, an item in it, or that of the latest step."""
    if _has_arrays(path):
        return path
    folders = sorted(x for x in path.iterdir() if x.is_dir()) if path.is_dir() else []
    if steps := [x for x in folders if x.name.isdigit()]:
        return _orbax_item(max(steps, key=lambda x: int(x.name)))
    return next(filter(_has_arrays, folders), None)


def _has_arrays(path: Path) -> bool:
    return any((path / name).is_file() for name in ORBAX)
