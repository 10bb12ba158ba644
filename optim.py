"""
Optimizers and their learning rate: AdamW with GPT-2's groups, or Muon for the matrices of the blocks.
"""
import collections
import concurrent.futures
import math
from functools import partial

import torch
from torch.overrides import TorchFunctionMode

import parallel
from device import is_out_of_memory
from loss import Lookup

def get_lr(it: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int) -> float:
    """ the learning rate of iteration `it`: linear warm-up, cosine decay, then min_lr

    >>> [round(get_lr(it, 1.0, 0.1, 4, 10), 2) for it in (0, 3, 4, 7, 10, 11)]
    [0.2, 0.8, 1.0, 0.55, 0.1, 0.1]
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)

def check_options(config: dict) -> None:
    """ raise ValueError for options of an optimizer that cannot be """
    name, beta1, beta2 = (config[key] for key in ('optimizer', 'beta1', 'beta2'))
    if name not in ('adamw', 'muon'):
        raise ValueError(f"there is no optimizer {name!r}; type --optimizer=adamw or --optimizer=muon")
    if max(beta1, beta2) >= 1:
        raise ValueError(f"beta1 and beta2 are {beta1} and {beta2}; type --beta1=0.9 --beta2=0.95, both "
                         "below 1")
    if config['decay_lr'] and config['min_lr'] > config['learning_rate']:
        raise ValueError(f"min_lr, {config['min_lr']}, is above learning_rate, {config['learning_rate']}; "
                         f"type --min_lr={config['learning_rate'] / 10:.3g}")

def doubts(config: dict, max_iters: int, warmup_iters: int, epochs: float) -> str:
    """ warnings, each after a newline, of a number of iterations or epochs that can hardly be meant """
    lines = []
    if config['init_from'] not in ('scratch', 'resume') and epochs > 100 and not config['num_epochs']:
        lines.append(f"{max_iters:,} iterations are {epochs:,.0f} epochs, and a finetuning takes 3 to 20; "
                     "type config/finetune/gpt2_small.py before the other options, or --num_epochs=5")
    if config['decay_lr'] and warmup_iters >= max_iters > 0:
        most = get_lr(max_iters - 1, config['learning_rate'], 0.0, warmup_iters, warmup_iters + 1)
        lines.append(f"the learning rate warms up for {warmup_iters:,} iterations, of which this run has "
                     f"{max_iters:,}: it reaches {most:.1e}; type --warmup_iters with less")
    return '' if config['eval_only'] else ''.join(f'\nwarning: {line}' for line in lines)

class InFloat32(TorchFunctionMode):
    """ a context in which .bfloat16(), which torch's Muon calls, makes a copy in float32 """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return function(*args, **(kwargs or {}))

class WideMuon(torch.optim.Muon):
    """ Muon with its products in float32: torch's are in bfloat16, which a CPU without instructions for it
    emulates, thirty times as slowly """

    def step(self, closure=None):
        with InFloat32():
            return super().step(closure)

class Pair:
    """ two optimizers with separate parameters, used as one """

    def __init__(self, first, second):
        self.both = first, second

    @property
    def param_groups(self): # rebuilt each time, since loading a state replaces an optimizer's groups
        return [group for optimizer in self.both for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.both:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {'pair': [optimizer.state_dict() for optimizer in self.both]}

NO_RAM = ("RAM ran out for the optimizer, which offload keeps there; free some, and type "
          "--init_from=resume, or this again where nothing is saved yet")

class OffloadedAdamW(torch.optim.AdamW):
    """ AdamW in RAM, for a model that keeps its matrices on a device in half precision

    The float32 weights, gradients and moments are CPU tensors, and the optimizer's state is AdamW's own.
    Token embeddings are looked up there, so the device's copy of that matrix is for the head alone. Each
    gradient leaves the device as soon as backward has made it; a thread adds it to those of the earlier
    micro-batches while backward goes on. Clipping needs the norm of all gradients (clip_gradients), so the
    update comes after backward, in the same thread: part by part in the order of the next forward, which
    `wait`s for each part before using it.
    Call `collect` before reading the gradients, `finish` before reading weights or moments.
    """

    def __init__(self, model, device: str, half: torch.dtype, groups, **options):
        self.pinned = device.startswith('cuda')
        self.stream = torch.cuda.Stream(device) if self.pinned else None
        init = (torch.cuda.set_device, (self.stream.device,)) if self.pinned else () # threads start on GPU 0
        self.thread = concurrent.futures.ThreadPoolExecutor(1, '', *init) # runs its jobs in order
        self.jobs, self.updates = collections.deque(), {} # futures: of gradients, of parts
        self.room = {} # buffers of past gradients, reused since the system is slow to give more memory
        self.limit = None # (maximum norm of the gradients, their norm)
        # not pinned, since pinning rounds sizes up to powers of two
        self.masters = {p: torch.nn.Parameter(p.detach().to('cpu', torch.float32))
                        for group in groups for p in group['params']}
        self.names = {name: self.masters[p] for name, p in model.named_parameters()}
        self.copies = {master: p for p, master in self.masters.items()}
        super().__init__([{**group, 'params': [self.masters[p] for p in group['params']]}
                          for group in groups],
                         fused=True, **options)
        self.updater = torch.optim.AdamW(list(self.copies), fused=True) # runs in the thread, on this state
        self.parts = {part: {self.masters[p] for p in part.parameters()} for part in model.parts()}
        for p, master in self.masters.items():
            # autocast would round these in the same way, but not the positions
            in_half = p.dim() == 2 and p is not model.transformer.wpe.weight
            p.data = master.detach().to(device, half if in_half else torch.float32, copy=True)
            if p is not model.lm_head.weight: # look_up sends its gradient
                p.register_post_accumulate_grad_hook(self.take)
        tied = self.masters[model.lm_head.weight]
        model.before = self.wait
        model.look_up = lambda idx, head_grad: Lookup.apply(idx, tied, head_grad, partial(self.send, tied))

    def room_for(self, tensor):
        """ RAM for a tensor to cross the bus; raises ValueError if there is none, which smaller micro-batches
        would not change """
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(NO_RAM) from None

    def take(self, p):
        """ send a gradient to RAM, and drop it on the device """
        grad, p.grad = p.grad, None
        self.send(self.masters[p], grad)

    def send(self, master, grad):
        """ start to add a gradient to those of a weight in RAM """
        sent = None
        if self.pinned: # copy while the device computes
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                buffer = self.room_for(grad)
                buffer.copy_(grad, non_blocking=True)
                grad.record_stream(self.stream)
                grad, sent = buffer, self.stream.record_event()
        self.jobs.append(self.thread.submit(self.add, master, grad, sent))
        if len(self.jobs) > 24: # two blocks: a compiled one sends its 12 at once; more would pile up in RAM
            self.jobs.popleft().result()

    def add(self, master, grad, sent):
        if sent:
            sent.synchronize()
        if master.grad is None:
            room = self.room.pop(master, None)
            master.grad = grad.to('cpu', torch.float32, copy=True) if room is None else room.copy_(grad)
        else:
            master.grad += grad.to('cpu')

    def collect(self):
        """ wait until all gradients have arrived """
        while self.jobs:
            self.jobs.popleft().result()

    def step(self, closure=None):
        """ start to update every part and to drop its gradients, while the caller goes on """
        self.collect()
        if getattr(self, 'found_inf', None): # set by float16's scaler
            return
        first = not self.updater.state
        self.updater.state = self.state
        if self.pinned: # first finish whatever still reads the weights there
            self.stream.wait_stream(torch.cuda.current_stream())
        limit, self.limit = self.limit, None
        for part, masters in self.parts.items():
            # copies, since the next iteration's learning rate is not for them
            groups = [{**group, 'params': [p for p in group['params'] if p in masters]}
                      for group in self.param_groups]
            self.updates[part] = self.thread.submit(self.update, groups, limit)
        if first: # it allocates the moments and transfer buffers, which may not fit
            for update in self.updates.values():
                update.result()
            self.finish()

    def update(self, groups, limit):
        """ update a part's weights in RAM and send them; return a CUDA event of their arrival, if pinned """
        masters = [p for group in groups for p in group['params']]
        if limit:
            torch.nn.utils.clip_grads_with_norm_(masters, *limit)
        self.updater.param_groups = groups
        self.updater.step()
        with torch.cuda.stream(self.stream), torch.no_grad():
            for master in masters:
                self.room[master], master.grad = master.grad, None
                copy = self.copies[master]
                copy.copy_(self.room_for(copy).copy_(master), non_blocking=self.pinned)
        return self.stream.record_event() if self.pinned else None

    def wait(self, part):
        """ wait until the weights of a part of the model are on the device; raises ValueError if its update
        found no room in RAM, since an iteration that is half done cannot be repeated """
        if part in self.updates:
            try:
                sent = self.updates[part].result()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ValueError(NO_RAM) from None
            if sent:
                torch.cuda.current_stream().wait_event(sent)
            del self.updates[part]

    def finish(self):
        """ wait until all parts are updated, and free the buffers kept for gradients """
        for part in list(self.updates):
            self.wait(part)
        self.room.clear()

    def state_dict(self):
        self.finish()
        return super().state_dict()

    def zero_grad(self, set_to_none: bool = True):
        while self.jobs: # ignore what they raise: these gradients are dropped
            self.jobs.popleft().exception()
        if not self.updates: # these drop their own gradients, and there are no others yet
            super().zero_grad(set_to_none)

def clip_gradients(optimizer, max_norm: float) -> float:
    """ clip the gradients by their total norm, as clip_grad_norm_ does, but leave them alone where it would
    multiply by 1; return the norm they had. An OffloadedAdamW clips only in its update. """
    params = [p for group in optimizer.param_groups for p in group['params']]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    total = parallel.full(norm).item()
    clips = total + 1e-6 > max_norm
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.limit = (max_norm, norm) if clips else None
    elif clips:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return total

def weights(model, optimizer) -> dict:
    """ the model's state dict in float32, wherever its weights are """
    state = model.state_dict()
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.finish()
        state.update({name: master.detach() for name, master in optimizer.names.items()})
    del state['lm_head.weight'] # tied: put shards together once, not into two tensors
    state = parallel.whole(state)
    return {**state, 'lm_head.weight': state['transformer.wte.weight']}

def make_optimizer(name: str, model, learning_rate: float, muon_learning_rate: float, weight_decay: float,
                   betas: tuple[float, float], offload_to: tuple[str, torch.dtype] | None = None,
                   wide: bool = False):
    """ the optimizer `name`: 'adamw', with decay for matrices but not for vectors, in nanoGPT's order; or
    'muon', for the matrices of the blocks, with AdamW for the rest

    With offload_to = (device, half), `model` moves there and the optimizer stays in RAM. `wide` keeps Muon's
    products in float32.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = {n: p for n, p in params.items() if name == 'muon' and p.dim() == 2 and '.h.' in n}
    rest = [p for n, p in params.items() if n not in hidden]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    if offload_to:
        assert name == 'adamw', "Muon's products want the device"
        return OffloadedAdamW(model, *offload_to, groups, lr=learning_rate, betas=betas)
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if not hidden:
        return adamw
    muon = WideMuon if wide else torch.optim.Muon
    return Pair(muon([*hidden.values()], lr=muon_learning_rate, weight_decay=weight_decay), adamw)

def set_lr(optimizer, factor: float) -> None:
    """ set every group's learning rate to `factor` times its initial one """
    for group in optimizer.param_groups:
        group['lr'] = group.setdefault('initial_lr', group['lr']) * factor

def load_optimizer(optimizer, state: dict) -> None:
    """ load the moments of a saved state, but keep the learning rate, betas and decay of this run

    Raises ValueError if the state is of another optimizer or of other parameters.
    """
    parts = optimizer.both if isinstance(optimizer, Pair) else [optimizer]
    try:
        for part, saved in zip(parts, state.get('pair', [state]), strict=True):
            groups = part.state_dict()['param_groups']
            if [len(g['params']) for g in saved['param_groups']] != [len(g['params']) for g in groups]:
                raise ValueError('other parameters')
            params = dict(enumerate(p for group in part.param_groups for p in group['params']))
            moments = {i: {key: parallel.spread(value, params[i]) for key, value in its.items()}
                       for i, its in saved['state'].items()}
            part.load_state_dict({'state': moments, 'param_groups': groups})
    except (AttributeError, LookupError, TypeError, ValueError): # LookupError: a moment of no parameter
        raise ValueError("the checkpoint is of another optimizer or of other trained parameters; type the "
                         "--optimizer it was trained with, or --init_from=ITS_FOLDER --out_dir=ANOTHER and "
                         "the run's other options to start anew from its weights") from None
