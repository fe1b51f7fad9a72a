"""CUDA on a CPU: torch's host code works as on an H100, and the CPU does the arithmetic. No GPU is needed.

Import this before torch, then call install(). There are two devices, or as many as FAKE_CUDA_DEVICES in
the environment says. It has two parts.
1. cuda_runtime.c replaces the CUDA runtime: devices, streams, events and pinned memory. So torch.cuda answers
   by its own code. A real kernel, or memory of a GPU, ends the process.
2. A CudaTensor is on cuda:N for all who ask, while its numbers are in a CPU tensor. A dispatch mode sees the
   operations that make tensors on a GPU or move them there. Everything above that is torch's own C++:
   autocast and autograd of CUDA, branches on is_cuda() as in dropout, the choice of an attention kernel,
   DistributedDataParallel's reducer, process groups.

It shows which dtype each operation gets and gives under CUDA's autocast; that no operation mixes dtypes or
devices that CUDA refuses to mix, or has no CUDA kernel; what branches on the device's type do; which
attention runs; where the host waits for the GPU.

It does not show what CUDA's kernels compute, what they refuse beyond the CPU's, their speed and memory; NCCL
(gloo runs the collectives); races between streams, or after copies with non_blocking; CUDA graphs, which are
refused; TorchScript's fuser, which is off. Random numbers are the CPU's. It uses private functions of torch:
cuda_runtime.why_not() says for which version.
"""

import functools
import os
import sys

from tests.support import cuda_runtime

cuda_runtime.load()

import torch  # noqa: E402
from torch._C._distributed_c10d import Work, _create_work_from_future  # noqa: E402
from torch.optim import Optimizer  # noqa: E402
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402

aten = torch.ops.aten
CPU = torch.device("cpu")
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Their results' shapes or values must be known on the CPU
READ_BY_HOST = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
# Libraries ask for the number of devices when they are imported. After torch's own answer a fork could not
# use CUDA, but our programs run in forks of a process that has done the imports (launcher.py)
torch._C._cuda_getDeviceCount = lambda: int(os.environ["FAKE_CUDA_DEVICES"])
watchers = []  # functions of (op, args, kwargs, result), called after each operation that touches CUDA


@functools.cache
def is_composite(op):
    """Whether the operation is made of others, for each device alike."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), COMPOSITE)


@functools.cache
def has_cuda_kernel(op):
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), "CUDA")


@functools.cache
def is_cuda_attention(op):
    return "_scaled_dot_product_" in op.name() and not op.name().endswith("_for_cpu")


def leaves(x):
    """What is in nested lists, tuples and dicts (torch's own pytree does it, many times as slowly)."""
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple)):
        return [x]
    return [leaf for part in x for leaf in leaves(part)]


def map_leaves(function, x):
    """The same lists, tuples and dicts with function(leaf) in place of each leaf."""
    if isinstance(x, dict):
        return {key: map_leaves(function, part) for key, part in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([map_leaves(function, part) for part in x])
    return function(x)


class CudaTensor(torch.Tensor):
    """A tensor on a GPU for all who ask. `numbers`: a CPU tensor of its shape and strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers, device):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=device,
        )
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    # What torch's C++ reads without an operation
    def untyped_storage(self):  # safetensors and PEFT ask which tensors share one
        return self.numbers.untyped_storage()

    def data_ptr(self):
        return self.numbers.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __reduce_ex__(self, protocol):  # torch.save; what is loaded is on the CPU
        return self.numbers.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"{self.device} {self.numbers!r}"


class OperationsWithoutCudaTensors(TorchDispatchMode):
    """Those that make tensors on a GPU, and those that move them there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    """Do one operation on the numbers; the results are where CUDA would have them."""
    if is_composite(op):  # autograd takes these apart, but not in inference mode
        with OperationsWithoutCudaTensors():
            return op._op_dk(COMPOSITE, *args, **kwargs)
    tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    devices = {x.device for x in tensors if isinstance(x, CudaTensor)}
    device = torch.device(kwargs.get("device") or next(iter(devices), CPU))
    if not devices and device.type != "cuda":
        return op(*args, **kwargs)
    check_devices(op, args, tensors, devices)
    result = compute(op, map_leaves(to_numbers, args), map_leaves(to_numbers, kwargs))
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    result = from_numbers(op, args, result, device, tensors)
    if devices and device.type == "cuda" and op.namespace == "aten" and not is_cuda_attention(op):
        result = return_and_correct_aliasing(op, args, kwargs, result)
    for x in leaves(result):
        if isinstance(x, CudaTensor) and (x.shape, x.stride()) != (x.numbers.shape, x.numbers.stride()):
            raise NotImplementedError(f"{op} changed a tensor's shape in place")
    for watch in watchers:
        watch(op, args, kwargs, result)
    return result


def to_numbers(x):
    """An argument as the CPU's operation takes it."""
    if isinstance(x, CudaTensor):
        return x.numbers
    if isinstance(x, torch.Generator):  # of CUDA: the CPU's own is taken
        return None
    return CPU if isinstance(x, torch.device) else x


def from_numbers(op, args, result, device, tensors):
    """Results of the CPU's operation as they belong on `device`; of those in `tensors`, themselves."""
    given = {id(x.numbers if isinstance(x, CudaTensor) else x): x for x in tensors}

    def convert(x):
        if id(x) in given:
            return given[id(x)]
        return CudaTensor(x, device) if isinstance(x, torch.Tensor) and device.type == "cuda" else x

    # In inference mode, too, a view of a normal tensor is a normal tensor
    normal = op.namespace == "aten" and op.is_view and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
        result = map_leaves(convert, result)
    if op.namespace == "c10d":  # DDP takes the sums from the future: it must hold CudaTensors
        Work.unbox(result[-1]).wait()
        future = torch.futures.Future()
        future.set_result([x for x in leaves(result) if isinstance(x, torch.Tensor)])
        result = (*result[:-1], _create_work_from_future(future).boxed())
    return result


def check_devices(op, args, tensors, devices):
    """Refuse what CUDA refuses: no kernel there; more than one device, but for numbers on the CPU."""
    if op.namespace != "aten" or not devices or op in COPIES:
        return
    if not has_cuda_kernel(op):
        raise NotImplementedError(f"Could not run '{op}' with arguments from the 'CUDA' backend")
    strangers = [x for x in tensors if not isinstance(x, CudaTensor) and (x.dim() or "_fused" in op.name())]
    if op in INDEXED:  # the indices may be on the CPU
        strangers = [x for x in strangers if any(x is y for y in args[:1] + args[2:])]
    if strangers or len(devices) > 1:
        found = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{op}: Expected all tensors to be on the same device, but found {found}")


def compute(op, args, kwargs):
    """The operation on CPU tensors. Of the attention that only CUDA has, the formula in float32."""
    if not is_cuda_attention(op):
        return op(*args, **kwargs)
    names = (argument.name for argument in op._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dropout_p"):
        raise NotImplementedError("dropout inside of attention")
    query, key, value = (given[name].float() for name in ("query", "key", "value"))  # (B, heads, T, size)
    scale = given.get("scale") or query.shape[-1] ** -0.5
    scores = query @ key.mT * scale
    bias = given.get("attn_bias")
    if bias is not None and bias.numel():
        scores = scores + bias.float()
    if given.get("is_causal"):
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp[..., None]).exp()
    dtype = given["query"].dtype
    if "backward" in op.name():
        grad = given["grad_out_" if "grad_out_" in given else "grad_out"].float()
        grad_weights = grad @ value.mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        gradients = [x.to(dtype) for x in (grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad)]
        return *gradients, *[None] * (len(op._schema.returns) - 3)
    out = (weights @ value).to(dtype)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernels lay it out so
    lengths = {"max_q": query.shape[2], "max_k": key.shape[2]}
    unused = torch.zeros((), dtype=torch.long)  # random states, of no use without dropout
    return out, logsumexp, *(lengths.get(x.name, unused) for x in op._schema.returns[2:])


def host_waits(op, args, kwargs):
    """How often the host waits for the GPU in this operation."""
    if op in READ_BY_HOST:
        return 1
    if op in INDEXED:  # a mask as index is counted first, but for one number from the CPU (masked_fill)
        if len(args) > 2 and args[2].numel() == 1 and not isinstance(args[2], CudaTensor):
            return 0
        return sum(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if op in (aten.copy_.default, aten._to_copy.default):
        source = args[0] if op is aten._to_copy.default else args[1]
        target = torch.device(kwargs.get("device") or args[0].device)
        non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
        pageable = source.device.type == "cpu" and source.numel() > 0 and not source.is_pinned()
        return int(source.device.type != target.type and (pageable or not non_blocking))
    return 0


def load(*args, map_location=None, upstream=torch.load, **kwargs):
    """torch.load, which would move storages to a GPU, not tensors."""
    if not isinstance(map_location, (str, torch.device)) or torch.device(map_location).type != "cuda":
        return upstream(*args, map_location=map_location, **kwargs)
    loaded = upstream(*args, map_location=CPU, **kwargs)
    return map_leaves(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, loaded)


def tensor(data, *args, upstream=torch.tensor, **kwargs):
    """torch.tensor, which would read the numbers of a list's tensors without an operation."""
    if isinstance(data, (list, tuple)):
        data = map_leaves(lambda x: x.item() if isinstance(x, CudaTensor) else x, data)
    return upstream(data, *args, **kwargs)


def refuse_graph(*_, **__):
    raise NotImplementedError("CUDA graphs are not emulated: this would capture one")


def install():
    """Emulate CUDA from here on in this process and in its forks."""
    torch.autograd.set_multithreading_enabled(False)  # a thread for each device would not see the mode
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") moves in the mode's sight
    torch._C._jit_set_texpr_fuser_enabled(False)  # it would compile a kernel for the codec's snake()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to(): `.data =` keeps a class
    for module in (_foreach_utils, sys.modules[Optimizer.__module__]):
        module._foreach_supported_types.append(CudaTensor)
    torch.load, torch.tensor = load, tensor
    torch.cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = refuse_graph
    OperationsWithoutCudaTensors().__enter__()
