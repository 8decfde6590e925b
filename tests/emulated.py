"""A stand-in for a GPU: its tensors have a shape, a type and a device, but no numbers.

What scripts do on CUDA is run on it whole: two devices in one operation are an error, as on CUDA,
and what makes the host wait, or the device wait for the host, is written down. All that is read
back is 1. Its device type is `lazy`, for which autograd works without hardware.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import common

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("lazy:0")


def on_host(value):
    """A checkpoint's record with ones for what is on the device."""
    if isinstance(value, dict):
        return {key: on_host(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(on_host, value))
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, FakeTensor) else value


def caller():
    """file.function of the project that is running, the innermost."""
    frame = sys._getframe(2)
    while frame:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.parent in (ROOT, ROOT / "benchmark") and name[0] != "<":
            return f"{path.stem}.{name}"
        frame = frame.f_back
    return "the test"


class Device(TorchDispatchMode):
    """The mode in which that device exists; waits: [file.function] that waited, in order."""

    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), []

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if isinstance(t, FakeTensor)]
        if not here and to != DEVICE.type:
            with unset_fake_temporarily():
                return op(*args, **kwargs)
        if name == "_local_scalar_dense":  # .item(), float(), if
            self.waits.append(caller())
            return {torch.bool: True, torch.int64: 1}.get(here[0].dtype, 1.0)
        if name == "equal":
            self.waits.append(caller())
            return True
        if name == "nonzero":
            self.waits.append(caller())
            return torch.empty(len(here[0]), here[0].dim(), dtype=torch.int64, device=DEVICE)
        if name in ("index", "index_put_"):
            places = [self.rows(place) for place in args[1]]
            args = (args[0], places, *args[2:])
        if to == "cpu" or name == "copy_" and not isinstance(args[0], FakeTensor):
            self.waits.append(caller())
            out = args[0] if name == "copy_" else op(*args, **kwargs)
            with unset_fake_temporarily():
                return torch.ones(out.shape, dtype=out.dtype)
        # from the host; non_blocking ones do not wait if their memory is pinned, as on CUDA
        blocks = not kwargs.get("non_blocking")
        if len(here) < len(tensors) and name in ("_to_copy", "copy_") and blocks:
            self.waits.append(caller())
        return op(*args, **kwargs)

    def rows(self, place):
        """The rows that a mask selects: how many, only the device knows."""
        if not isinstance(place, FakeTensor) or place.dtype != torch.bool:
            return place
        self.waits.append(caller())
        return torch.empty(len(place), dtype=torch.int64, device=DEVICE)


def copied(self, memo):
    """copy.deepcopy of a tensor on the device, which PyTorch lacks."""
    out = self.detach().clone()
    return nn.Parameter(out, self.requires_grad) if isinstance(self, nn.Parameter) else out


@contextlib.contextmanager
def device(patch):
    """The scripts run on it, with --device auto; patch: pytest's monkeypatch. Yields the Device."""
    load, save, sgd = torch.load, common.save, torch.optim.SGD

    def load_real(*args, **kwargs):
        with _disable_current_modes():
            return load(*args, **kwargs)

    def save_real(path, record):
        record = on_host(record)
        with _disable_current_modes():
            save(path, record)

    patch.setattr(common, "find_device", lambda name: DEVICE)
    patch.setattr(torch, "load", load_real)
    patch.setattr(common, "save", save_real)
    unfused = lambda *args, fused, **kwargs: sgd(*args, **kwargs)  # noqa: E731
    patch.setattr(torch.optim, "SGD", unfused)
    patch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
    patch.setattr(nn.Parameter, "__deepcopy__", copied)
    with Device() as found:
        yield found
