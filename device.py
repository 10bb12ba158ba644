"""
The machine: the device and the dtype that a run uses, whether it compiles its model, the signals it gets.

Each choice is an option that may be 'auto'.
"""
import contextlib
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import signal
import sys
import time

import psutil
import torch

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
OTHER_BUILDS = ('pip install --force-reinstall "torch>=2.9,<2.14" '
                '--index-url https://download.pytorch.org/whl/cu126')

CONTEXT = int(0.6 * 2**30) # bytes that CUDA and its libraries take of a card; 0.5 to 0.8 GiB on most
FILL = 0.95 # the share of a card's memory that tensors can fill; its allocator loses some to gaps
FILL_RAM = 0.75 # the same for RAM, where gaps are larger and a process that takes too much is killed silently

# peak FLOP/s of dense bf16 or fp16 matrix products with fp32 accumulation, from NVIDIA's data sheets
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12,
              'L40S': 362e12, 'L4': 121e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100-PCIE': 112e12,
              'V100': 125e12, 'T4': 65e12}

def pick_device(device: str) -> str:
    """ the fastest device available, or the one named; raises ValueError if that is not available, or if this
    build of torch has no kernels for it """
    allow_cudnn_attention(False)
    there = [f'cuda:{i}' for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there += ['mps'] if torch.backends.mps.is_available() else []
    there += ['cpu']
    if device == 'auto':
        device = there[0].split(':')[0]
        if device == 'cpu' and shutil.which('nvidia-smi') and is_first():
            why = ("is without a GPU or too old for this build of torch; see what nvidia-smi prints, run"
                   if torch.version.cuda else "is of no use to a build of torch without CUDA; run")
            print(f"warning: the NVIDIA driver here {why} {OTHER_BUILDS}, or type --device=cpu to go without "
                  "this line", file=sys.stderr)
    elif device not in there and not (device == 'cuda' and 'cuda:0' in there):
        raise ValueError(f"there is no device {device!r} here; type --device=NAME with one of: auto, "
                         f"{', '.join(there)}")
    if device.startswith('cuda') and not has_kernels(torch.cuda.get_device_capability(device)):
        raise ValueError(f"this build of torch has no kernels for {torch.cuda.get_device_name(device)}, only "
                         f"for {', '.join(torch.cuda.get_arch_list())}; run {OTHER_BUILDS} for older GPUs, "
                         "or type --device=cpu")
    if device.startswith('cuda:'): # else calls that name no GPU, such as pinning, take memory on the first
        torch.cuda.set_device(device)
    return device

def has_kernels(capability: tuple[int, int]) -> bool:
    """ whether this build of torch runs on GPUs of this compute capability: it has code for an earlier one of
    the same generation, or code that the driver translates """
    built = re.findall(r'(sm|compute)_(\d+)(\d)', ' '.join(torch.cuda.get_arch_list()))
    return not built or any( # none: not CUDA but ROCm
        (int(major), int(minor)) <= capability and (kind == 'compute' or int(major) == capability[0])
        for kind, major, minor in built)

def is_first() -> bool:
    """ whether this is the process of its machine that tells what all of them find """
    return os.environ.get('LOCAL_RANK', '0') == '0'

def allow_cudnn_attention(allowed: bool) -> None:
    """ let torch choose cuDNN's attention on CUDA, or not: it is fast for training, but prepares for each new
    length of a text, and some versions of torch let it round dropout to sixteenths
    (https://github.com/pytorch/pytorch/pull/174245) """
    torch.backends.cuda.enable_cudnn_sdp(allowed)

def train_fast(device: str, dropout: float) -> None:
    """ on CUDA, compute float32 products in TF32 and, without dropout, attention by cuDNN """
    if device.startswith('cuda'):
        torch.set_float32_matmul_precision('high')
        allow_cudnn_attention(dropout == 0)

def pick_dtype(dtype: str, device: str) -> str:
    """ the dtype of matrix products: the one named or, for 'auto', bfloat16 if the hardware computes it, else
    float16 on CUDA and float32 elsewhere; raises ValueError for an unknown name """
    if dtype != 'auto':
        if dtype not in DTYPES:
            raise ValueError(f"there is no dtype {dtype!r}; type --dtype=NAME with one of: auto, "
                             f"{', '.join(DTYPES)}")
        if (dtype == 'bfloat16' and device.startswith('cuda') and is_first()
                and not torch.cuda.is_bf16_supported(including_emulation=False)):
            print("warning: this GPU only emulates bfloat16, slowly, and attention takes more memory than is "
                  "planned; type --dtype=float16", file=sys.stderr)
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if device == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return 'bfloat16'
    return 'float32'

def autocast(device: str, dtype: str, cache: bool = False):
    """ a context in which matrix products run in `dtype`, and whatever needs float32 stays in it

    With `cache`, a weight's copy in `dtype` is kept until the context ends, for weights that are used often.
    """
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype], cache_enabled=cache)

def fetch(x, y, device: str):
    """ inputs and targets, numpy arrays (B, T), as tensors on the device """
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    pinned = device.startswith('cuda') # pinned memory is copied while the GPU computes
    if pinned:
        x, y = x.pin_memory(), y.pin_memory()
    # other memory is copied before going on, since MPS may read it after it is freed
    return x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned)

def pick_compile(choice, device: str) -> bool:
    """ whether to compile: as chosen or, for 'auto', on CUDA; raises ValueError for another choice """
    if choice not in ('auto', True, False):
        raise ValueError(f"compile is {choice!r}; type --compile=auto, True or False")
    pays = device.startswith('cuda') and importlib.util.find_spec('triton') is not None
    return pays if choice == 'auto' else choice

def compile_model(modules, trial) -> bool:
    """ compile modules in place; return whether that works here

    `trial()` runs them at once, so that a machine without a compiler costs one warning; if it runs out of
    memory, that error is raised.
    """
    # all blocks share one code object: frozen or not, training or not, of several batch sizes
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False # it splits a whole model; blocks are small enough
    # or it would warn, in four lines, that a block in a checkpoint must not change anything in place
    logging.getLogger('torch._higher_order_ops.wrap').setLevel(logging.ERROR)
    for module in modules:
        module.compile()
    try:
        trial()
    except Exception as error: # a missing or broken compiler may raise anything
        if is_out_of_memory(error):
            raise
        told = str(error).strip() or type(error).__name__
        reason = re.sub(r'^backend=.* raised:\s*', '', told).splitlines()[0][:150] # the rest says no more
        if is_first():
            print(f"warning: torch.compile does not work here ({reason}); going on without it",
                  file=sys.stderr)
        torch.compiler.set_stance('force_eager')
        return False
    return True

def peak_flops(device: str, dtype: str) -> float | None:
    """ the device's peak FLOP/s in bfloat16 or float16, or None if it is unknown """
    if not device.startswith('cuda'):
        return None
    name = torch.cuda.get_device_name(device)
    if dtype == 'float32' or re.search(r'Ti|SUPER|Laptop|NVL|MIG| D$', name):
        return None
    return next((flops for key, flops in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)

class Signals:
    """ what signals ask of a run: to stop (`end`, the number of SIGINT, SIGTERM or SIGHUP, or 0), or to save
    a checkpoint (`save`, by SIGUSR1); a second Ctrl-C exits at once

    On a single node, a run also stops when its torchrun is gone: nothing else would end its processes.
    """

    def __init__(self, say):
        self.end, self.save, self.time, self.say = 0, False, 0.0, say
        self.launcher = None
        if hasattr(signal, 'SIGUSR1'): # Windows has none
            signal.signal(signal.SIGUSR1, self.take_save)

    def listen(self):
        """ from now on, signals set `end` instead of ending the process; before, there is nothing to save """
        if 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            self.launcher = os.getppid()
        signal.signal(signal.SIGINT, self.take_end)
        signal.signal(signal.SIGTERM, self.take_end)
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN: # as under nohup
            signal.signal(signal.SIGHUP, self.take_end) # the terminal is gone

    def asked(self) -> list[float]:
        """ [whether to stop, whether to save], each 0 or 1 """
        if self.launcher and os.getppid() != self.launcher:
            self.take_end(signal.SIGTERM, None)
        return [float(self.end > 0), float(self.save)]

    def status(self) -> int:
        """ the exit status of a run that ends in order """
        return 130 if self.end == signal.SIGINT else 0

    def take_end(self, number, frame):
        if not self.end:
            self.end, self.time = number, time.time()
            self.say(f"stopping{'' if 'RANK' in os.environ else '; a second Ctrl-C leaves without saving'}")
        elif number == signal.SIGINT and (time.time() > self.time + 1 or 'RANK' not in os.environ):
            # torchrun passes on a signal that this process got as well: within a second, it is the same one
            os._exit(130)

    def take_save(self, number, frame):
        self.save = True

def describe_machine(device: str) -> str:
    """ processor or GPU, operating system, Python and torch, in a line """
    name = f'{os.cpu_count()} CPUs'
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    elif os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            models = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
        n = len(os.sched_getaffinity(0)) # those that a scheduler gives to this process
        name = f'{n} x {models[0]}' if models else name
    return f"{name}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"

def free_memory(device: str) -> int:
    """ the bytes that this process may still take on the device; resident memory on a CPU """
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0]
    if device == 'mps':
        return min(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(),
                   psutil.virtual_memory().available) # the GPU's memory is everybody's RAM
    try:
        free = min(psutil.virtual_memory().available, group_memory())
    except OSError: # an unusual /proc; what a small laptop has
        free = 8 * 2**30
    return free // int(os.environ.get('LOCAL_WORLD_SIZE', 1))

def group_memory(root: str = '/') -> float:
    """ the bytes that Linux's control groups leave this process: a container's, a scheduler's job's; inf
    without a limit """
    free, groups = math.inf, []
    with (contextlib.suppress(OSError),
          open(os.path.join(root, 'proc/self/cgroup'), errors='surrogateescape') as file):
        groups = [line.strip().split(':', 2)[1:] for line in file if line.count(':') > 1]
    for kinds, path in groups:
        if kinds and 'memory' not in kinds.split(','):
            continue
        base, most, used, cached = (
            ('memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file') if kinds else
            ('', 'memory.max', 'memory.current', 'inactive_file'))
        parts = path.strip('/').split('/')
        for n in range(len(parts) + 1): # the limits of the groups that it is in hold as well
            folder = os.path.join(root, 'sys/fs/cgroup', base, *parts[:n])
            with contextlib.suppress(OSError, ValueError): # no such file, or the limit is the word max
                with (open(os.path.join(folder, most)) as limit, open(os.path.join(folder, used)) as taken,
                      open(os.path.join(folder, 'memory.stat')) as stat): # what only caches files is free
                    files = sum(int(line.split()[1]) for line in stat if line.startswith(cached + ' '))
                    free = min(free, int(limit.read()) - int(taken.read()) + files)
    return free

def memory_to_fill(device: str, memory_gb: float, elsewhere: bool = False) -> float:
    """ the bytes that a run may fill with tensors: of the free memory and, if given, of memory_gb GiB, to
    which this process is then limited on a GPU; if `elsewhere`, of a CUDA card of that size """
    size = memory_gb * 2**30 - (CONTEXT if elsewhere or device.startswith('cuda') else 0)
    if memory_gb and size <= 0:
        raise ValueError(f"memory_gb is {memory_gb}, of which {CONTEXT / 2**30:.1f} GiB are taken to be "
                         "CUDA's own; type a larger --memory_gb, or --memory_gb=0 for all that is free")
    if elsewhere:
        return FILL * size
    free = free_memory(device)
    if memory_gb:
        free = min(free, size)
        if device.startswith('cuda'):
            fraction = size / torch.cuda.get_device_properties(device).total_memory
            index = torch.device(device).index # None for plain 'cuda', which that call refuses
            torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), index)
    return (FILL_RAM if device == 'cpu' else FILL) * free

def is_out_of_memory(error: Exception) -> bool:
    """ whether the device, or the RAM of a CPU, had no room for a tensor """
    texts = 'out of memory', "can't allocate memory", 'ALLOC_FAILED'
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)

def memory_mb(device: str) -> float:
    """ the most memory this process has held so far, in MiB: the device's, or resident memory on a CPU """
    if device.startswith('cuda'):
        return torch.cuda.max_memory_reserved(device) / 2**20
    if device == 'mps':
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError: # Windows
        return psutil.Process().memory_info().peak_wset / 2**20
    unit = 2**20 if sys.platform == 'darwin' else 2**10 # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
