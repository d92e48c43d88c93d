"""GPUs that are not there: tensors on `cuda` are fake (shape, type, device), those on the CPU real.

What fails on a GPU fails here: operators on tensors of two devices, a collective of what NCCL does not take, whatever a
graph's capture forbids, memory that is read at a replay and was freed before it, a group that ends before such a graph.
Reads by the host give plain values (1.0, and nothing is equal). One process runs at a time: rank 0 leaves the files
that were there at each barrier, for another rank to find at the same one. Not seen: numbers, time, deadlocks, kernels'
own workspaces, fragmentation, Inductor, NCCL itself.
"""

import os
import shutil
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import cuda_guard  # noqa: F401 (before torch)

# isort: split
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
UNTIMED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
MEMORY = 80 * 2**30  # bytes of the GPU
LARGE = 2**26  # bytes of what the host reads from which on no memory is taken for it


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def size_of(tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Gpu(TorchDispatchMode):
    """Operators with a tensor or a device that is CUDA's go to a FakeTensorMode; others are computed on the CPU."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.graph = None  # the one being captured
        self.live, self.storages = 0, {}  # bytes; storage -> (weak reference, operator that made it)
        self.start()

    def start(self) -> None:
        """Counting starts afresh."""
        self.counts, self.peak, self.collectives = Counter(), self.live, []

    def host(self, what: str, counted: str | None = None, amount: int = 1) -> None:
        """The host waits for the device, which no capture permits."""
        if self.graph is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if counted:
            self.counts[counted] += amount

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        if not any(isinstance(t, FakeTensor) for t in tensors) and not on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if func.namespace == "prim":  # a question about a tensor
            with self.fake:
                return func(*args, **kwargs)
        if (answer := self._read(func, args, kwargs)) is not None:
            return answer
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for index in args[1] for part in self._places(index)], *args[2:])
        return self._launch(func, args, kwargs | ({"generator": None} if kwargs.get("generator") else {}), tensors)

    def _read(self, func, args, kwargs):
        """What the host gets where it reads; copies between the two are counted. None: a kernel of the device."""
        if func is aten._local_scalar_dense.default:
            self.host("item", "host_reads")
            return False if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.equal.default:
            self.host("equal", "host_reads")
            return False
        if func not in (aten._to_copy.default, aten.copy_.default):
            return None
        source, target = args[0], kwargs.get("device")
        if func is aten.copy_.default:
            source, target = args[1], args[0].device
        if not isinstance(source, FakeTensor) and on_gpu(target):
            if source.is_pinned():
                self.counts["from_pinned"] += size_of(source)
                return None
            self.host("copy from pageable memory", "to_gpu", size_of(source))
        elif isinstance(source, FakeTensor) and target is not None and not on_gpu(target):
            self.host("copy to the host", "from_gpu", size_of(source))
            if func is aten.copy_.default:
                return args[0]
            return self._plain(source.shape, kwargs.get("dtype") or source.dtype)
        return None

    @staticmethod
    def _plain(shape, dtype):
        """What the host finds in a tensor: integers count, other numbers are random, much is all one number."""
        if dtype is torch.long:
            return torch.arange(shape.numel()).view(shape)
        if shape.numel() * dtype.itemsize > LARGE:
            return torch.ones(1, dtype=dtype).expand(shape)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def _places(self, index):
        """A mask of the host becomes the positions it names, as their number is known."""
        if not isinstance(index, torch.Tensor) or isinstance(index, FakeTensor):
            return [index]
        self.host("index from the host")
        return index.nonzero(as_tuple=True) if index.dtype is torch.bool else [index]

    def _launch(self, func, args, kwargs, tensors):
        name = func.overloadpacket.__name__
        views = [returned.alias_info for returned in func._schema.returns]
        is_view = views and all(alias is not None and not alias.is_write for alias in views)
        self.counts["kernels"] += name not in UNTIMED and not is_view
        if self.graph is not None:
            self.graph.reads(tensors)

        def fake(x):
            return self.fake.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x

        with self.fake:
            out = func(*tree_map(fake, args), **tree_map(fake, kwargs))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._allocated(tensor, name)
        return out

    def _allocated(self, tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self._freed(key, size)), name
            self.live += size
            self.peak = max(self.peak, self.live)
            if self.graph is not None:
                self.graph.own.add(key)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        del self.storages[key]

    def collective(self, name: str, *tensors) -> None:
        """What NCCL demands of tensors."""
        for tensor in tensors:
            assert tensor.is_cuda, f"{name}: no backend for tensors on {tensor.device}"
            assert tensor.is_contiguous(), f"{name}: tensors must be contiguous"
        assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"{name}: tensors of several shapes or types"
        if self.graph is not None:
            self.graph.reads(tensors)
            self.graph.collectives += 1
        self.collectives.append([name, list(tensors[0].shape), str(tensors[0].dtype).removeprefix("torch.")])


GPU = Gpu()
PINNED = weakref.WeakKeyDictionary()  # storages of the host that are not paged
GRAPHS = weakref.WeakSet()  # those that are there


class Graph:
    """A CUDA graph: what it read and did not allocate itself must be there when it is replayed."""

    def __init__(self):
        self.own, self.read, self.collectives = set(), {}, 0
        GRAPHS.add(self)

    def reads(self, tensors) -> None:
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in GPU.storages and key not in self.own:
                self.read[key] = GPU.storages[key]

    def replay(self) -> None:
        gone = [name for reference, name in self.read.values() if reference() is None]
        assert not gone, f"a graph is replayed that reads what was freed, made by {gone}"


class Event:
    """Of a stream; every time between two is 1 ms."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_) -> None:
        assert GPU.graph is None, "events are not timed in a capture"

    def synchronize(self) -> None:
        GPU.host("event.synchronize", "host_reads")

    def elapsed_time(self, _) -> float:
        return 1.0


@contextmanager
def capture(graph, *_, **__):
    GPU.graph = graph
    try:
        yield
    finally:
        GPU.graph = None


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other) -> None:
        pass


class Fused(torch.autograd.Function):
    """A kernel whose output is like its first input; its backward is one kernel too."""

    @staticmethod
    def forward(ctx, keeps_output: bool, *inputs):
        GPU.counts["kernels"] += 1
        out = torch.empty_like(inputs[0])
        ctx.save_for_backward(*inputs, *([out] if keeps_output else []))
        return out

    @staticmethod
    def backward(ctx, grad):
        GPU.counts["kernels"] += 1
        return None, *map(torch.empty_like, ctx.saved_tensors[: len(ctx.needs_input_grad) - 1])


def patch_kernels() -> None:
    """RMS norm and attention, which a CPU build would take apart, by the kernel that torch chooses on Ampere."""
    functional = torch.nn.functional
    norm, attention = functional.rms_norm, functional.scaled_dot_product_attention

    def rms_norm(x, shape, weight=None, eps=None):
        return Fused.apply(False, x) if isinstance(x, FakeTensor) else norm(x, shape, weight, eps)

    def sdpa(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        together = q.dtype is torch.float32 or mask is not None  # no kernel of these knows grouped queries
        if not isinstance(q, FakeTensor) or (enable_gqa and together):
            return attention(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
        assert len({t.device for t in (q, k, v, *([] if mask is None else [mask]))}) == 1
        return Fused.apply(True, q, k, v)

    functional.rms_norm, functional.scaled_dot_product_attention = rms_norm, sdpa


def patch_torch() -> None:
    """`torch.cuda`, and what makes tensors where no mode sees it."""
    properties = type("Properties", (), {"total_memory": MEMORY, "major": 8, "minor": 0, "name": "fake"})()
    said = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
            "_lazy_init": None, "get_device_name": "fake", "get_device_properties": properties,
            "get_device_capability": (8, 0), "reset_peak_memory_stats": None}  # fmt: skip
    for name, value in said.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    cuda = torch.cuda
    cuda.synchronize = lambda *_: GPU.host("synchronize", "host_reads")
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: GPU.peak
    cuda.nccl.version = lambda: (2, 27, 5)
    cuda.mem_get_info = lambda *_: (MEMORY - GPU.live, MEMORY)
    cuda.is_current_stream_capturing = lambda: GPU.graph is not None
    cuda.Stream, cuda.current_stream = Stream, lambda *_: Stream()
    cuda.CUDAGraph, cuda.Event, cuda.graph, cuda.stream = Graph, Event, capture, lambda _: nullcontext()
    torch.compile = lambda function=None, **_: function
    generator, tensor, as_tensor = torch.Generator, torch.tensor, torch.as_tensor
    torch.Generator = lambda device="cpu": generator("cpu")
    torch.tensor = lambda data, *a, device=None, **k: tensor(data, *a, **k).to(device or "cpu")
    torch.as_tensor = lambda data, *a, device=None, **k: as_tensor(data, *a, **k).to(device or "cpu")

    empty, empty_like = torch.empty, torch.empty_like

    def pinned(tensor, really):
        if really:
            PINNED[tensor.untyped_storage()] = True
        return tensor

    torch.empty = lambda *a, pin_memory=False, **k: pinned(empty(*a, **k), pin_memory)
    torch.empty_like = lambda *a, pin_memory=False, **k: pinned(empty_like(*a, **k), pin_memory)
    torch.Tensor.is_pinned = lambda self: self.untyped_storage() in PINNED

    def listed(index):
        if isinstance(index, tuple):
            return tuple(map(listed, index))
        return tensor(list(index)) if isinstance(index, list | range) else index

    put, get = torch.Tensor.__setitem__, torch.Tensor.__getitem__
    FakeTensor.__setitem__ = lambda self, index, value: put(self, listed(index), value)
    FakeTensor.__getitem__ = lambda self, index: get(self, listed(index))


def patch_processes(rank: int, world: int, work: Path, others: Path) -> None:
    """A group whose other members are silent; `others` holds, barrier by barrier, what rank 0 had written in `work`."""
    begin, end, barriers = dist.init_process_group, dist.destroy_process_group, iter(range(10**6))

    def barrier(*_, **__):
        GPU.host("barrier")
        written = others / str(next(barriers))
        if rank == 0 and work.exists():
            shutil.copytree(work, written, copy_function=os.link)  # files are replaced here, never changed
        elif written.exists():
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(written, work, copy_function=os.link)

    def gathered(into, thing, group=None):
        into[:] = [thing] * len(into)

    dist.init_process_group = lambda *_, **__: begin("fake", store=FakeStore(), rank=rank, world_size=world)
    dist.all_reduce = lambda tensor, group=None: GPU.collective("all_reduce", tensor)
    dist.all_gather = lambda parts, part, group=None: GPU.collective("all_gather", part, *parts)

    def destroy(*_):
        assert not [graph for graph in GRAPHS if graph.collectives], "the group goes before a graph that uses it"
        end()

    dist.barrier, dist.all_gather_object, dist.destroy_process_group = barrier, gathered, destroy
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(world)}
