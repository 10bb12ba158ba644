"""
Which parts of a model are trained: all, all but some frozen ones, or LoRA's matrices alone.

LoRA, https://arxiv.org/abs/2106.09685: a matrix W (out, in) is frozen, and two narrow ones beside it are
trained. The layer computes W x + alpha / rank * B A x, with A (rank, in) and B (out, rank), which starts at
zero. In a checkpoint of such a run, A and B replace the weights; it says which model W is from.
"""
import math
import re
import zlib

import torch
from torch import nn
from torch.nn import functional as F

from recompute import Linear

TARGETS = 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj' # the matrices of a block

def freeze_parts(model, names: str) -> None:
    """ freeze the parts that `names` lists, such as 'wte,wpe,h.0-5'; wte is the head, too

    Raises ValueError for a part that does not exist, or if nothing is left to train.
    """
    for name in names.split(','):
        span = re.fullmatch(r'\s*h\.(\d+)-(\d+)\s*', name)
        last = min(int(span[2]), len(model.transformer.h)) if span else 0 # if too large, fails below
        paths = [f'h.{i}' for i in range(int(span[1]), last + 1)] if span else [name.strip()]
        try:
            parts = [model.transformer.get_submodule(path) for path in paths if path]
        except AttributeError:
            parts = []
        if not parts or not all(list(part.parameters()) for part in parts): # such as drop
            raise ValueError(f"there is no {name!r} to freeze; type --freeze with some of wte, wpe, ln_f, "
                             "h.0, h.0-1, h.0.mlp; the last block is "
                             f"h.{len(model.transformer.h) - 1}")
        for part in parts:
            part.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze = {names!r} leaves nothing to train; name fewer parts")

def restrict(model, config: dict) -> None:
    """ train only what the options freeze and lora_rank select; a model that has LoRA layers keeps them;
    raises ValueError if the options do not fit together, or do not fit those layers """
    if config['lora_rank'] and config['optimizer'] == 'muon':
        raise ValueError("muon does not train LoRA's matrices; type --optimizer=adamw")
    if layers(model):
        for key, has in settings(model).items():
            wanted = config[f'lora_{key}']
            if key == 'targets':
                wanted = ','.join(read_targets(wanted))
            if key != 'dropout' and has != wanted:
                raise ValueError(f"lora_{key} is {wanted!r}, but the checkpoint's adapter has {has!r}; type "
                                 f"--lora_{key}={has}")
        for linear in layers(model):
            linear.lora_dropout = config['lora_dropout']
    elif config['lora_rank']:
        torch.manual_seed(config['seed'])
        add(model, *(config[f'lora_{key}'] for key in ('rank', 'alpha', 'dropout', 'targets')))
    if config['freeze']:
        freeze_parts(model, config['freeze'])

class LoRALinear(Linear):
    """ a Linear to which `add` has given lora_A, lora_B, their scale and their dropout """

    def forward(self, x):
        down = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A) # (B, T, rank)
        more = F.linear(down, self.lora_B) * self.lora_scale # before W x, where a second pass may end
        return super().forward(x) + more

def read_targets(names: str) -> list[str]:
    """ those of TARGETS that `names` lists, whole or by their ends: c_proj is both of that name, as in PEFT;
    raises ValueError for any other name """
    names = [name.strip() for name in names.split(',')]
    found = [{target for target in TARGETS if f'.{target}'.endswith(f'.{name}')} for name in names]
    if not all(found):
        raise ValueError(f"there is no {names[found.index(set())]!r} to adapt; type --lora_targets with some "
                         f"of {','.join(TARGETS)}")
    return [target for target in TARGETS if target in set.union(*found)]

def add(model, rank: int, alpha: float, dropout: float, targets: str) -> None:
    """ freeze a GPT, and give trainable A and B to the matrices in `targets`, such as 'attn.c_attn,mlp.c_fc'

    Raises ValueError for a name that read_targets does not know.
    """
    model.requires_grad_(False)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout}; type --lora_dropout=P with 0 <= P < 1")
    for block in model.transformer.h:
        for name in read_targets(targets):
            linear = block.get_submodule(name)
            linear.__class__ = LoRALinear # its weight and bias keep their names
            linear.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
            linear.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
            nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5)) # as the paper's authors do
            linear.lora_alpha, linear.lora_scale, linear.lora_dropout = alpha, alpha / rank, dropout

def layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]

def settings(model) -> dict:
    """ the arguments of `add` that made the model's LoRA layers """
    targets = [name for name in TARGETS if isinstance(model.transformer.h[0].get_submodule(name), LoRALinear)]
    linear = layers(model)[0]
    return {'rank': linear.lora_A.size(0), 'alpha': linear.lora_alpha, 'dropout': linear.lora_dropout,
            'targets': ','.join(targets)}

def adapter(model) -> dict:
    """ A and B of all LoRA layers, by their names in the model """
    return {name: tensor for name, tensor in model.state_dict().items() if '.lora_' in name}

def load(model, tensors: dict) -> None:
    """ load the tensors of `adapter` into a model after `add`; raises RuntimeError if they do not fit """
    if tensors.keys() != adapter(model).keys():
        raise RuntimeError("the adapter's matrices are not those that its rank and targets say")
    model.load_state_dict(tensors, strict=False)

@torch.no_grad()
def merge(model) -> None:
    """ add the scaled B A to the weights, which makes the model a plain GPT again """
    for linear in layers(model):
        linear.weight += linear.lora_scale * linear.lora_B @ linear.lora_A
        del linear.lora_A, linear.lora_B
        linear.__class__ = Linear
    model.requires_grad_(True)

def shrink(model, dtype: torch.dtype) -> None:
    """ store the frozen matrices in `dtype`, in which they are multiplied anyway; embeddings, which are only
    looked up, are rounded with them """
    for p in model.parameters():
        if p.dim() == 2 and not p.requires_grad:
            p.data = p.data.to(dtype)

def fingerprint(tensors, total: int = 0) -> int:
    """ a checksum over a piece of every tensor, which any training would change; `total` is that of others
    before them """
    for p in tensors:
        total = zlib.crc32(p.detach().flatten()[:1024].float().cpu().numpy().tobytes(), total)
    return total

SUMS = 'base_adapter', 'base_fingerprint' # how a checkpoint knows its base: by the first that both have

def known_by(model, loaded: dict) -> dict:
    """ the checksums by which runs know this model as their base: of its weights and, since those of a merged
    adapter differ a little between machines, of the adapter; `loaded` is the rest of its checkpoint """
    adapter = {'base_adapter': loaded['fingerprint']} if 'fingerprint' in loaded else {}
    return {'base_fingerprint': fingerprint(model.parameters()), **adapter}

def is_base(model, loaded: dict, checkpoint: dict) -> bool:
    """ whether this model is the base of what is in a checkpoint, as far as that is recorded """
    now = known_by(model, loaded)
    known = [key for key in SUMS if key in now and key in checkpoint]
    return not known or checkpoint[known[0]] == now[known[0]]
