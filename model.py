"""
GPT-2: the model, its pretrained weights and how it continues a text.

References:
1) OpenAI's TensorFlow implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
2) Hugging Face's PyTorch implementation, to which this one is equal:
https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py
Parameter names are nanoGPT's. Shapes: B sequences of T tokens, C = n_embd channels.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention import attend
from loss import ChunkedLoss, CrossEntropy, Lookup
from sampling import FixedStep, KVCache, one_row, sample_token

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # in the linear layers and layer norms, as GPT-2 has it

GPT2_SHAPES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768), # 124M parameters
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024), # 355M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280), # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600), # 1558M
}

class HalfLinear(torch.autograd.Function):
    """ x (..., n_in) in half precision times weight (n_out, n_in), plus bias, both rounded to x's format; or
    `stand_in`, of the result's shape, where only what is kept for backward counts """

    @staticmethod
    def forward(ctx, x, weight, bias, stand_in):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if stand_in is not None:
            return stand_in.detach() # a selective checkpoint lets in nothing else that was not done before
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        dx = grad @ weight.to(grad.dtype) if needs_dx else None
        dw = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if needs_dw else None
        return dx, dw, rows.sum(0).float() if needs_db else None, None

class Linear(nn.Linear):
    """ a Linear that under autocast keeps no copy of its weight in half precision for backward, which rounds
    it again """

    stand_in = None # SecondPass's, for a result that nothing needs

    def forward(self, x):
        device = x.device.type
        learns = torch.is_grad_enabled() and torch.is_autocast_enabled(device)
        if not learns or torch.compiler.is_compiling(): # what is compiled does so by is_cast
            return super().forward(x)
        return HalfLinear.apply(x.to(torch.get_autocast_dtype(device)), self.weight, self.bias,
                                self.stand_in)

class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias) # queries, keys, values
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) # (B, n_head, T, head_size)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache.mask if cache is not None else None)
        y = y.transpose(1, 2).reshape(B, T, C) # the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))) # GPT-2's GELU is tanh's

ATTENTION = [getattr(torch.ops.aten, f'_scaled_dot_product_{kind}').default for kind in (
    'flash_attention', 'efficient_attention', 'cudnn_attention', 'flash_attention_for_cpu')]
DROPPED_ATTENTION = torch.ops.fitgpt.dropped_attention.default
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
LINEAR = torch.ops.aten.linear.default # a product as MPS has it

def is_kept(draws, ctx, op, *args, **options):
    """ whether a selective block keeps what `op` makes: attention and the products of its matrices, told from
    LoRA's (of a rank below n_embd / 4) by shape; that of the MLP's c_proj only in float32 with dropout after
    it, since backward stops before it otherwise

    draws says that there is dropout: then torch's attention runs again, since left out it would not draw, and
    what comes after it would draw otherwise than before; ours draws its seed before. torch passes all
    arguments but this one.
    """
    keep = op == DROPPED_ATTENTION or op in ATTENTION and not draws
    if op in PRODUCTS or op == LINEAR:
        n_in, n_out = args[1].shape[::-1] if op == LINEAR else args[-1].shape
        keep = n_out // 4 <= n_in <= n_out * (4 if draws and args[0].dtype == torch.float32 else 1)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

def is_cast(ctx, op, *args, **options):
    """ whether a compiled block's backward makes again what `op` makes: a weight's copy in half precision, as
    in Linear; all else is for the compiler to choose """
    again = op == torch.ops.aten._to_copy.default and args[0].dim() == 2
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE

class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.selective = False # backward makes all again but what is_kept
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def layers(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

    def forward(self, x, cache=None):
        learns = x.requires_grad or any(p.requires_grad for p in self.parameters())
        compiles = torch.compiler.is_compiling()
        lean = self.selective or compiles and isinstance(self.mlp.c_fc, Linear)
        if not (lean and learns and torch.is_grad_enabled()):
            return self.layers(x, cache)
        # what is compiled gives each draw a seed of its own
        keep = partial(is_kept, self.attn.dropout > 0 and not compiles) if self.selective else is_cast
        contexts = partial(create_selective_checkpoint_contexts, keep)
        if not compiles:
            contexts = partial(self.two_passes, x, contexts)
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=contexts)

    def two_passes(self, x, contexts=lambda: (nullcontext(), nullcontext())):
        """ for checkpoint, the contexts of a pass over x, and of a SecondPass for backward """
        first, second = contexts()
        return first, SecondPass(self.mlp.c_proj, x, second)

FORGOTTEN = 'mps' # the device whose draws torch's checkpoint does not repeat

class SecondPass:
    """ the context of a block that is run again for backward, over x; under autocast it ends before its last
    product: torch stops at the last tensor that backward needs, which a HalfLinear keeps as it returns

    The stand-in's values are whatever was in memory: of what comes after, only dropout's mask counts, which
    does not depend on them.
    """

    def __init__(self, last, x, context):
        self.last, self.x, self.context = last, x, context
        self.rng = torch.mps.get_rng_state() if x.device.type == FORGOTTEN else None

    def __enter__(self):
        device = self.x.device.type
        if self.rng is not None:
            self.later = torch.mps.get_rng_state()
            torch.mps.set_rng_state(self.rng)
        if torch.is_autocast_enabled(device):
            self.last.stand_in = torch.empty_like(self.x, dtype=torch.get_autocast_dtype(device))
        self.context.__enter__()

    def __exit__(self, *error):
        self.last.stand_in = None
        if self.rng is not None:
            torch.mps.set_rng_state(self.later)
        return self.context.__exit__(*error)

class GPT(nn.Module):
    """ token ids (B, T) to logits or a loss; raises ValueError for a config of sizes that make no model """

    def __init__(self, config: GPTConfig):
        super().__init__()
        check_shape(config)
        self.config = config
        self.draws = config.dropout > 0 # whether a pass in training is random
        self.recompute = False # for backward, keep what enters the blocks, and run each block again
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight # one matrix, tied
        self.cross_entropy = CrossEntropy()
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'): # 2 * n_layer of them add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self, trained: bool = False) -> int:
        """ the parameters, the tied matrix counted once: 124,439,808 for gpt2; or only those that are
        trained """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trained)

    def follow(self, plan: str) -> None:
        """ keep for backward what this plan of memory.py's does """
        self.recompute = plan in ('recompute', 'offload')
        for block in self.transformer.h:
            block.selective = plan == 'selective'

    def parts(self) -> list:
        """ the modules that hold all parameters, in the order in which a pass comes to them """
        t = self.transformer
        return [t.wte, t.wpe, *t.h, t.ln_f]

    def before(self, part) -> None:
        """ called ahead of each of `parts`; an optimizer that still sends its weights waits here for them """

    def compiled_parts(self) -> list:
        """ what to compile, each for itself, for training """
        return [*self.transformer.h, self.cross_entropy]

    def flops_per_token(self, T: int) -> float:
        """ forward and backward, T tokens a sequence; PaLM's appendix B, https://arxiv.org/abs/2204.02311 """
        config = self.config
        matrices = self.num_params() - self.transformer.wpe.weight.numel() # positions are looked up
        frozen = self.num_params() - self.num_params(trained=True) # no gradient of their own
        return 6 * matrices - 2 * min(frozen, matrices) + 12 * config.n_layer * config.n_embd * T

    def hidden(self, idx, cache=None, head=None):
        """ the last layer's output (B, T, C) for token ids idx (B, T), from which lm_head makes logits

        cache, a KVCache a layer, holds the tokens before idx; head is the list that ChunkedLoss shares.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens are more than block_size"
        pos = cache[0].positions(T, idx.device) if cache else torch.arange(T, device=idx.device)
        wte, wpe, ln_f = self.transformer.wte, self.transformer.wpe, self.transformer.ln_f
        self.before(wte)
        x = wte(idx) if head is None else Lookup.apply(idx, wte.weight, head)
        self.before(wpe)
        x = x + wpe(pos) # (B, T, C)
        x = self.transformer.drop(x.to(ln_f.weight.dtype)) # embeddings may be in half precision
        for i, block in enumerate(self.transformer.h):
            self.before(block)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.draws,
                               context_fn=partial(block.two_passes, x))
            else:
                x = block(x, cache[i] if cache else None)
        self.before(ln_f)
        return ln_f(x)

    def forward(self, idx, targets=None, cache=None, scale=None):
        """ (logits, loss) of token ids idx (B, T), one of them None

        With targets (B, T), of which -1 do not count, the loss is their cross-entropy in nats: the mean, or
        `scale` times the sum. Without, the logits are those of the last position, (B, 1, vocab_size).
        """
        head = [] # the gradient of the tied matrix on its way from the head to the embedding
        x = self.hidden(idx, cache, head)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if scale is None:
            scale = 1 / (targets >= 0).sum()
        weight = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        return None, ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), scale, head,
                                       self.cross_entropy)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, n_vocab: int | None = None, fixed: bool | None = None):
        """ yield max_new_tokens times the next token (B,) of each sequence of the prompt idx (B, T >= 1)

        The options are sample_token's. Past block_size the window restarts from its second half. `fixed` says
        whether shapes stay fixed, as a CUDA graph wants them; None is True on CUDA.
        """
        block_size, window = self.config.block_size, idx[:, -self.config.block_size:]
        length = min(block_size, window.size(1) + max_new_tokens)
        cache, step = [KVCache(length) for _ in self.transformer.h], None
        fixed = idx.is_cuda if fixed is None else fixed
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window = window[:, -(block_size // 2 or 1):]
                for layer in cache:
                    layer.size = 0
            if cache[0].size == 0:
                logits, _ = self(window, cache=cache)
            elif fixed:
                step = step or FixedStep(self, cache, token)
                logits = step(token)
            else:
                with one_row(token, self.lm_head.weight.dtype):
                    logits, _ = self(token[:, None], cache=cache)
            token = sample_token(logits[:, -1, :n_vocab].float(), temperature, top_k, top_p)
            yield token
            token = token.clamp(min=0) # -1, where there was none to draw, is none to look up
            window = torch.cat((window, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens: int, *args, **options):
        """ idx (B, T) and what stream, with the same arguments, makes of it: (B, T + max_new_tokens) """
        tokens = self.stream(idx, max_new_tokens, *args, **options)
        return torch.cat([idx, *(token[:, None].clamp(min=0) for token in tokens)], dim=1)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict) -> 'GPT':
        """ a model of these tensors, which it keeps; raises RuntimeError where a name or a shape differs """
        with torch.device('meta'): # no memory and no time for weights that go at once
            model = cls(config)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @staticmethod
    def pretrained_config(source: str, dropout: float = 0.0, revision: str = 'main') -> GPTConfig:
        """ the shape of a model of Hugging Face's; raises ValueError if it computes otherwise than ours """
        from transformers import AutoConfig
        c = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        ours = dict(model_type=['gpt2'], activation_function=['gelu_pytorch_tanh', 'gelu_new'], # the same
                    n_inner=[None, 4 * getattr(c, 'n_embd', 0)], scale_attn_weights=[True],
                    scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True],
                    layer_norm_epsilon=[1e-5])
        for key, values in ours.items():
            if getattr(c, key, None) not in values:
                raise ValueError(f"its {key} is {getattr(c, key, None)!r}, and GPT-2's is {values[-1]!r}; "
                                 "take another model")
        config = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout, bias=True)
        check_shape(config)
        return config

    @classmethod
    def from_pretrained(cls, source: str, dropout: float = 0.0, revision: str = 'main') -> 'GPT':
        """ GPT-2 from Hugging Face: one of the four names, a hub id, or a local directory; raises ValueError
        where it computes otherwise or lacks weights """
        from transformers import GPT2LMHeadModel
        config = cls.pretrained_config(source, dropout, revision)
        theirs, info = GPT2LMHeadModel.from_pretrained(
            source, revision=revision, weights_only=True, output_loading_info=True,
            attn_implementation='eager') # or config.json could name code on the hub
        if info['missing_keys']:
            raise ValueError(f"{source} lacks the weights {sorted(info['missing_keys'])[:3]} and maybe more; "
                             "expected a whole GPT-2; fetch or save it again")
        conv1d = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight') # (in, out) in theirs, (out, in) in ours
        weights = {name: tensor.t().contiguous() if name.endswith(conv1d) else tensor
                   for name, tensor in theirs.state_dict().items()}
        return cls.from_weights(config, weights)

def check_shape(config: GPTConfig) -> None:
    """ raise ValueError for sizes that make no model """
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; type --{name}=N with N at least 1")
    if config.n_layer > 1000: # making so many takes long
        raise ValueError(f"n_layer is {config.n_layer:,}; type --n_layer=N with N at most 1000")
    if config.n_embd % config.n_head:
        near = [n for n in range(1, config.n_embd + 1) if config.n_embd % n == 0]
        near = min(near, key=lambda n: abs(n - config.n_head))
        raise ValueError(f"n_embd = {config.n_embd} does not divide into n_head = {config.n_head} equal "
                         f"heads; type --n_head={near}, for instance")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}; type --dropout=P with 0 <= P < 1")

def check_length(block_size: int, positions: int) -> None:
    """ raise ValueError for sequences that are longer than a model's positions """
    if block_size > positions:
        raise ValueError(f"block_size is {block_size}, but the model has {positions} positions; type "
                         f"--block_size={positions} or less")
