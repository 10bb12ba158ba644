"""
Several processes, as torchrun starts them: joining and leaving, sums over all of them, and sharding a model;
and the job that torchrun starts again.

A sharded run writes what any other run writes: `whole` puts its tensors together, `spread` shards them again.
"""
import datetime
import gc
import os
import socket
import sys
import zlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def start_processes(backend: str, device: str) -> tuple[int, int, str]:
    """ join the processes that torchrun started, if any; return (rank, world_size, this process's device)

    Raises ValueError if the backend is not available, for more processes than GPUs, or for a GPU's number.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"there is no backend {backend!r}; type --backend=auto, nccl (CUDA) or gloo")
    if 'RANK' not in os.environ:
        return 0, 1, device
    if device.startswith('cuda:'):
        raise ValueError(f"device is {device!r}, but torchrun's processes each take another GPU; type "
                         "--device=cuda")
    if device == 'cuda':
        gpus, wanted = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if wanted > gpus:
            raise ValueError(f"this node has {wanted} processes, but each sees {gpus} of its GPUs; start one "
                             "torchrun on each node, with --nproc_per_node=N for the N GPUs that it sees")
        if 'LOCAL_RANK' not in os.environ:
            raise ValueError("there is a RANK in the environment, but no LOCAL_RANK; start this by torchrun")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if backend == 'auto': # Windows has no NCCL
        backend = 'nccl' if device.startswith('cuda') and dist.is_nccl_available() else 'gloo'
    hook = sys.excepthook
    try:
        store, rank, world_size = next(dist.rendezvous('env://'))
        # on one node, torchrun keeps its store in a restart, with the addresses of processes that have ended
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        elif rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            print("warning: a node that is lost cannot return; to let it, end this run and type export "
                  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each node before torchrun", file=sys.stderr)
        # the others wait this long while one saves to a slow disk
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(hours=1))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"torch.distributed does not start with backend {backend!r} ({error}); type "
                         "--backend=auto, nccl (CUDA) or gloo") from None
    sys.excepthook = hook # torch has wrapped it in one that loses what ours prints
    return dist.get_rank(), dist.get_world_size(), device

def stop_processes() -> None:
    """ leave the process group in order; gloo's threads abort a process whose Python exits before they do """
    if dist.is_initialized():
        gc.collect() # free whatever else holds the group
        dist.destroy_process_group()

def all_sum(values: list[float], op=dist.ReduceOp.SUM) -> list[float]:
    """ each value, summed over all processes, or reduced by another `op` """
    if not dist.is_initialized():
        return values
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, op)
    return total.tolist()

def least(value: float) -> float:
    """ the minimum of all processes' values """
    return all_sum([value], dist.ReduceOp.MIN)[0]

def agree(choice: str, choices: list[str]) -> str:
    """ the first of `choices` that some process has chosen, for GPUs or CPUs of several kinds """
    return choices[int(least(choices.index(choice)))]

def in_any(flag: bool) -> bool:
    """ whether this is so in at least one process """
    return all_sum([float(flag)])[0] > 0

def are_same(value: int) -> bool:
    """ whether all processes have this value """
    return least(value) == -least(-value)

def in_first(work) -> None:
    """ call work() in the first process; if it raises an error, each process does """
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except (OSError, ValueError, ImportError) as its:
            error = its
    failed = in_any(error is not None)
    if error:
        raise error
    if failed:
        raise ValueError("the first process cannot start; see its error")

def share(sequences: int, world_size: int, config: dict) -> int:
    """ how many sequences of an iteration each process gets; raises ValueError if `shard` is set where it
    cannot be or, unless the run only evaluates, if the sequences do not divide evenly """
    if config['shard'] and not can_shard(world_size, config):
        do = 'start train.py by torchrun' if world_size == 1 else 'type --optimizer=adamw and no --lora_rank'
        raise ValueError(f"shard is for several processes and adamw, without LoRA; {do}, or --shard=False")
    if sequences % world_size and not config['eval_only']:
        low = sequences // world_size * world_size
        advice = f"make it {low} or {low + world_size}" if low else f"make it {world_size}"
        if config['init_from'] == 'resume': # then an iteration keeps its size
            *less, most = [str(n) for n in range(1, sequences + 1) if sequences % n == 0]
            advice = f"start it with {', '.join(less)}{' or ' * bool(less)}{most} of them"
        raise ValueError(f"batch_size * gradient_accumulation_steps is {sequences}, which {world_size} "
                         f"processes cannot share evenly; {advice}")
    return max(1, sequences // world_size)

def can_shard(world_size: int, config: dict) -> bool:
    """ whether shard_model supports these options """
    return world_size > 1 and not config['lora_rank'] and config['optimizer'] == 'adamw'

def check_same(iter_num: int, out_dir: str) -> None:
    """ raise ValueError if the processes do not all start at this iteration """
    if not are_same(iter_num):
        raise ValueError(f"the processes found different checkpoints in {out_dir}, this one iteration "
                         f"{iter_num}; type --out_dir with a folder that all nodes share")

def check_data(mark: str, dataset: str) -> None:
    """ raise ValueError if `mark`, a fingerprint of the data, is not the same in all processes """
    if not are_same(zlib.crc32(mark.encode())):
        raise ValueError(f"the processes read different data in {dataset}; copy one node's to all, or type "
                         "--dataset with a folder that they share")

def launch_id() -> str | None:
    """ an id of torchrun's job and this command, the same after torchrun or a scheduler starts it again; None
    without torchrun """
    job = os.environ.get('TORCHELASTIC_RUN_ID')
    if job == 'none': # without --rdzv_id, the job is this agent's
        job = f'{socket.gethostname()}:{os.getppid()}'
    return job and ' '.join([job, *sys.argv])

def replicate_model(model, device: str, step):
    """ the model in DDP, which averages gradients over the processes; unless they are set to None, they stay
    in DDP's buckets, where micro-batches add up without a second copy of them

    DDP rebuilds its buckets, beside the old ones, in the second forward. So step(model), a forward and a
    backward, is called twice here, before an optimizer's moments exist.
    """
    for p in model.parameters():
        if p.requires_grad: # DDP copies existing gradients into its buckets, and points p.grad to them
            p.grad = torch.zeros_like(p)
    replica = DistributedDataParallel(model, device_ids=[device] if device.startswith('cuda') else None,
                                      gradient_as_bucket_view=True)
    for _ in range(2):
        step(replica)
        model.zero_grad(set_to_none=False)
    return replica

def shard_model(model, world_size: int, device: str) -> None:
    """ leave each process a shard of every parameter (FSDP2), on the device; a block is gathered when its
    turn comes, the embeddings for the whole of an iteration """
    from torch.distributed.fsdp import fully_shard # imported here, since few runs need it
    mesh = dist.init_device_mesh(torch.device(device).type, (world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

def is_sharded(tensor) -> bool:
    return hasattr(tensor, 'full_tensor') # as DTensor has

def full(tensor):
    """ the whole tensor, from the shards of all processes; all of them must call this """
    return tensor.full_tensor() if is_sharded(tensor) else tensor

def whole(state):
    """ a state (nested dicts and lists) whose sharded tensors are put together in the first process's RAM;
    the other processes must call this, too, and get None for these tensors """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not is_sharded(state):
        return state
    tensor = full(state)
    return tensor.cpu() if dist.get_rank() == 0 else None

def spread(tensor, like):
    """ this process's shard of a whole tensor, sharded like the parameter `like` """
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
