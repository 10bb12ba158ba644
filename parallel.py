"""
Several processes, as torchrun starts them: joining and leaving, adding up, and a model cut into shards; and
runs that must not write to one folder.

What a sharded run writes is what any run writes: `whole` puts a tensor together again, `spread` cuts it.
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
    """ join the processes that torchrun started, if it did: (rank, world_size, this process's device)

    Raises ValueError for a backend that is not there, or for more processes than GPUs.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"there is no backend {backend!r}; type --backend=auto, nccl (CUDA) or gloo")
    if 'RANK' not in os.environ:
        return 0, 1, device
    if device == 'cuda':
        gpus, wanted = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if wanted > gpus:
            raise ValueError(f"{wanted} processes share {gpus} GPUs; type --nproc_per_node={gpus}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if backend == 'auto':
        backend = 'nccl' if device.startswith('cuda') else 'gloo'
    hook = sys.excepthook
    try:
        store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1': # a node's torchrun keeps its store in a restart,
            # with the addresses of processes that have ended
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        elif rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            print("warning: a node that is lost cannot return; to let it, end this run and type export "
                  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each node before torchrun", file=sys.stderr)
        # the others wait as long as this while one saves to a slow disk
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=datetime.timedelta(hours=1))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"torch.distributed does not start with backend {backend!r} ({error}); type "
                         "--backend=auto, nccl (CUDA) or gloo") from None
    sys.excepthook = hook # torch has put one before it that loses what ours prints
    return dist.get_rank(), dist.get_world_size(), device

def stop_processes(world_size: int) -> None:
    """ leave the others in order; gloo's threads abort a process whose Python ends before they do """
    if world_size > 1:
        gc.collect() # of whatever else holds the group
        dist.destroy_process_group()

def all_sum(values: list[float], world_size: int, device: str) -> list[float]:
    """ each value, added up over all processes """
    if world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float32 if device == 'mps' else torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

def least(value: float, world_size: int, device: str) -> float:
    """ the least of all processes' values """
    if world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float32 if device == 'mps' else torch.float64, device=device)
    dist.all_reduce(total, dist.ReduceOp.MIN)
    return total.item()

def share(sequences: int, world_size: int, config: dict) -> int:
    """ how many sequences of an iteration are a process's; raises ValueError where that is not even, but for
    an evaluation, which shares otherwise """
    if sequences % world_size and not config['eval_only']:
        low = sequences // world_size * world_size
        advice = f"make it {f'{low} or ' * (low > 0)}{low + world_size}"
        if config['init_from'] == 'resume': # and an iteration stays as it is
            *less, most = [n for n in range(1, sequences + 1) if sequences % n == 0]
            advice = f"start it with {', '.join(map(str, less)) or 'no more'} or {most} of them"
        raise ValueError(f"an iteration has {sequences} sequences (batch_size * "
                         f"gradient_accumulation_steps), which {world_size} processes cannot share evenly; "
                         + advice)
    return max(1, sequences // world_size)

def can_shard(world_size: int, config: dict) -> bool:
    """ whether shard_model can do what these options ask for """
    return world_size > 1 and not config['lora_rank'] and config['optimizer'] == 'adamw'

def check_shard(world_size: int, config: dict) -> None:
    """ raise ValueError where shard_model is asked for what it cannot do """
    if config['shard'] and not can_shard(world_size, config):
        raise ValueError("shard is for several processes, adamw and whole matrices; start train.py by "
                         "torchrun, or type --shard=False")

def are_same(value: int, world_size: int, device: str) -> bool:
    """ whether this value is the mean of all processes' """
    return all_sum([value], world_size, device)[0] == value * world_size

def check_same(iter_num: int, world_size: int, device: str, out_dir: str) -> None:
    """ raise ValueError where the processes do not all start at this iteration """
    if not are_same(iter_num, world_size, device):
        raise ValueError(f"the processes found different checkpoints in {out_dir}, this one iteration "
                         f"{iter_num}; type --out_dir with a folder that all nodes share")

def same_data(mark: str, world_size: int, device: str, dataset: str) -> str:
    """ the mark of the data that all processes read; raises ValueError where another's is not this one """
    if not are_same(zlib.crc32(mark.encode()), world_size, device):
        raise ValueError(f"the processes read different data in {dataset}; copy one node's to all, or type "
                         "--dataset with a folder that they share")
    return mark

def launch_id() -> str | None:
    """ torchrun's job and this command, the same when torchrun or a scheduler starts it again; None without
    torchrun """
    job = os.environ.get('TORCHELASTIC_RUN_ID')
    if job == 'none': # no --rdzv_id was given: the job is that of this agent
        job = f'{socket.gethostname()}:{os.getppid()}'
    return job and ' '.join([job, *sys.argv])

def replicate_model(model, device: str, step):
    """ the model with gradients that are the processes' mean (DDP); until they are set to None, they lie in
    DDP's buckets, and micro-batches add up there without a second copy of them

    DDP makes its buckets anew, beside the old ones, in the second forward: so step(model), a forward and a
    backward, is called twice here, before there are an optimizer's moments.
    """
    for p in model.parameters():
        if p.requires_grad: # DDP copies what is there into its buckets, and lets p.grad point to them
            p.grad = torch.zeros_like(p)
    replica = DistributedDataParallel(model, device_ids=[device] if device.startswith('cuda') else None,
                                      gradient_as_bucket_view=True)
    for _ in range(2):
        step(replica)
        model.zero_grad(set_to_none=False)
    return replica

def shard_model(model, world_size: int, device: str) -> None:
    """ leave each process its share of every parameter (FSDP2), which goes to the device; a block is put
    together when its turn comes, and the embeddings for the whole of an iteration """
    from torch.distributed.fsdp import fully_shard # here, since few runs need it
    mesh = dist.init_device_mesh(torch.device(device).type, (world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

def is_sharded(tensor) -> bool:
    return hasattr(tensor, 'full_tensor') # of DTensor

def full(tensor):
    """ a tensor with the shares of all processes; all of them must ask for it """
    return tensor.full_tensor() if is_sharded(tensor) else tensor

def whole(state):
    """ a state (nested dicts and lists) with its shards put together, in RAM, for the first process; the
    others must ask for it too, and get None for these """
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if not is_sharded(state):
        return state
    tensor = full(state)
    return tensor.cpu() if dist.get_rank() == 0 else None

def spread(tensor, like):
    """ this process's share of a whole tensor, cut as the parameter `like` is """
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
