"""
GPT-2: the model, its pretrained weights and how it continues a text.

References:
1) OpenAI's TensorFlow implementation: https://github.com/openai/gpt-2/blob/master/src/model.py
2) Hugging Face's PyTorch implementation, which this one matches:
https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py
Parameter names are nanoGPT's. Shapes: B sequences of T tokens, C = n_embd channels.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention import attend
from loss import ChunkedLoss, CrossEntropy, Head, Lookup
from recompute import Linear, close_gaps, run_again, run_partly_again
from sampling import FixedStep, KVCache, one_row, penalize, sample_token

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # in the linear layers and layer norms, as in GPT-2

    def __post_init__(self):
        check_shape(self)

GPT2_SHAPES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768), # 124M parameters
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024), # 355M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280), # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600), # 1558M
}

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
        y = y.transpose(1, 2).reshape(B, T, C) # put the heads side by side again
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))) # tanh, as in GPT-2

class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.selective = False # whether backward recomputes all but what recompute.is_kept names
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def layers(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

    def forward(self, x, cache=None):
        learns = x.requires_grad or any(p.requires_grad for p in self.parameters())
        if learns and torch.is_grad_enabled() and (self.selective or torch.compiler.is_compiling()):
            return run_partly_again(self, x) # compiled, at least the casts
        return self.layers(x, cache)

class GPT(nn.Module):
    """ token ids (B, T) to logits or a loss; raises ValueError if the config's sizes are invalid """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.lean = False # whether it follows a plan that saves memory
        self.recompute = False # keep only the input of each block, and run the block again in backward
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight # one matrix, tied
        self.cross_entropy = CrossEntropy() # a module, so that it can be compiled
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
        """ the number of parameters, the tied matrix counted once: 124,439,808 for gpt2; or only of those
        that are trained """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trained)

    def hidden(self, idx, cache=None, head_grad=None):
        """ the last layer's output (B, T, C) for token ids idx (B, T), from which lm_head makes logits

        cache: a KVCache per layer, holding the tokens before idx. head_grad: see forward.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens are more than block_size"
        pos = cache[0].positions(T, idx.device) if cache else torch.arange(T, device=idx.device)
        wte, wpe, ln_f = self.transformer.wte, self.transformer.wpe, self.transformer.ln_f
        self.before(wte)
        x = wte(idx) if cache or head_grad is None else self.look_up(idx, head_grad)
        self.before(wpe)
        x = x + wpe(pos) # (B, T, C)
        x = self.transformer.drop(x.to(ln_f.weight.dtype)) # embeddings may be in half precision
        for i, block in enumerate(self.transformer.h):
            self.before(block)
            if self.recompute and torch.is_grad_enabled():
                x = run_again(block, x)
            else:
                x = block(x, cache[i] if cache else None)
        self.before(ln_f)
        return ln_f(x)

    def forward(self, idx, targets=None, cache=None, scale=None):
        """ (logits, loss) for token ids idx (B, T); one of the two is None

        With targets (B, T), where -1 is ignored, the loss is their cross-entropy in nats: the mean, or
        `scale` times the sum. Without targets, the logits are of the last position, (B, 1, vocab_size).
        """
        head_grad = [] # takes the tied matrix's gradient from ChunkedLoss's backward to Lookup's
        x = self.hidden(idx, cache, head_grad)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if scale is None:
            scale = 1 / (targets >= 0).sum()
        if self.lean and torch.is_grad_enabled():
            close_gaps(x)
        # detached, or ChunkedLoss would compute its gradient under no_grad, too
        weight = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        return None, ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), scale,
                                       head_grad, self.cross_entropy)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               n_vocab: int | None = None, fixed: bool | None = None, repetition_penalty: float = 1.0):
        """ yield the next token (B,) of each sequence of the prompt idx (B, T >= 1), max_new_tokens times

        The options are those of sample_token and, for what the model sees, of penalize. Past block_size the
        window restarts from its second half. `fixed` keeps all shapes fixed, as a CUDA graph needs them; None
        means True on CUDA.
        """
        block_size, window = self.config.block_size, idx[:, -self.config.block_size:]
        length = min(block_size, window.size(1) + max_new_tokens)
        cache, step = [KVCache(length) for _ in self.transformer.h], None
        fixed = idx.is_cuda if fixed is None else fixed
        self.lm_head.ready()
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
            logits = logits[:, -1, :n_vocab].float()
            if repetition_penalty != 1:
                logits = penalize(logits, window, repetition_penalty)
            token = sample_token(logits, temperature, top_k, top_p)
            yield token
            token = token.clamp(min=0) # -1, when none could be drawn, cannot be looked up
            window = torch.cat((window, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens: int, *args, **options):
        """ idx (B, T) continued by `stream`, which takes the same arguments: (B, T + max_new_tokens) """
        tokens = self.stream(idx, max_new_tokens, *args, **options)
        return torch.cat([idx, *(token[:, None].clamp(min=0) for token in tokens)], dim=1)

    def follow(self, plan: str) -> None:
        """ keep for backward what this plan of memory.py keeps """
        self.lean, self.recompute = plan != 'device', plan in ('recompute', 'offload')
        for block in self.transformer.h:
            block.selective = plan == 'selective'

    def parts(self) -> list:
        """ the modules that hold all parameters, in the order in which a forward pass reaches them """
        t = self.transformer
        return [t.wte, t.wpe, *t.h, t.ln_f]

    def n_idle(self) -> int:
        """ how many first blocks backward never reaches, since nothing in or before them is trained: 6 with
        freeze = 'wte,wpe,h.0-5' """
        learns = [any(p.requires_grad for p in part.parameters()) for part in self.parts()[:-1]]
        return 0 if any(learns[:2]) else [*learns[2:], True].index(True)

    def before(self, part) -> None:
        """ called before each of `parts` runs; an offloading optimizer waits here for the part's weights """

    def look_up(self, idx, head_grad):
        """ the embeddings (B, T, C) of idx; an offloading optimizer takes them from its float32 weights """
        return Lookup.apply(idx, self.transformer.wte.weight, head_grad)

    def compiled_parts(self) -> list:
        """ the modules to compile for training, each on its own """
        return [*self.transformer.h, self.cross_entropy]

    def flops_per_token(self, T: int) -> float:
        """ FLOPs of forward and backward at length T; PaLM, appendix B, https://arxiv.org/abs/2204.02311 """
        config, block, wpe = self.config, self.transformer.h[0], self.transformer.wpe.weight
        used = [p for p in self.parameters() if p is not wpe] # positions are looked up
        n, frozen = sum(p.numel() for p in used), sum(p.numel() for p in used if not p.requires_grad)
        # of the 6, 2 are for a weight's gradient (not if frozen), 2 for an input's (not in an idle block)
        idle = self.n_idle() * (2 * sum(p.numel() for p in block.parameters()) + 8 * config.n_embd * T)
        return 6 * n - 2 * frozen - idle + 12 * config.n_layer * config.n_embd * T

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict) -> 'GPT':
        """ a model that takes over these tensors; raises RuntimeError if a name or a shape differs """
        with torch.device('meta'): # no memory or time for weights that are replaced at once
            model = cls(config)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @staticmethod
    def pretrained_config(source: str, revision: str, dropout: float = 0.0) -> GPTConfig:
        """ the shape of a Hugging Face model; raises ValueError if it computes something else than ours """
        from transformers import AutoConfig
        c = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        ours = dict(model_type=['gpt2'], activation_function=['gelu_pytorch_tanh', 'gelu_new'], # synonyms
                    n_inner=[None, 4 * getattr(c, 'n_embd', 0)], scale_attn_weights=[True],
                    scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True],
                    layer_norm_epsilon=[1e-5])
        for key, values in ours.items():
            if getattr(c, key, None) not in values:
                raise ValueError(f"its {key} is {getattr(c, key, None)!r}, and GPT-2's is {values[-1]!r}; "
                                 "take another model")
        return GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout, bias=True)

    @classmethod
    def from_pretrained(cls, source: str, dropout: float = 0.0, revision: str = 'main') -> 'GPT':
        """ GPT-2 from Hugging Face: one of the four names, a hub id, or a local directory; raises ValueError
        if it computes something else or lacks weights """
        from transformers import GPT2LMHeadModel
        config = cls.pretrained_config(source, revision, dropout)
        theirs, info = GPT2LMHeadModel.from_pretrained(
            source, revision=revision, weights_only=True, output_loading_info=True,
            attn_implementation='eager') # else config.json could name code on the hub
        if info['missing_keys']:
            raise ValueError(f"{source} lacks the weights {sorted(info['missing_keys'])[:3]} and maybe more; "
                             "expected a whole GPT-2; fetch or save it again")
        conv1d = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight') # (in, out) in theirs, (out, in) in ours
        weights = {name: tensor.t().contiguous() if name.endswith(conv1d) else tensor
                   for name, tensor in theirs.state_dict().items()}
        return cls.from_weights(config, weights)

def check_shape(config: GPTConfig) -> None:
    """ raise ValueError for invalid sizes """
    for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; type --{name}=N with N at least 1")
    if config.n_layer > 1000: # more would take long to build
        raise ValueError(f"n_layer is {config.n_layer:,}; type --n_layer=N with N at most 1000")
    if config.n_embd % config.n_head:
        near = [n for n in range(1, config.n_embd + 1) if config.n_embd % n == 0]
        near = min(near, key=lambda n: abs(n - config.n_head))
        raise ValueError(f"n_embd = {config.n_embd} does not divide into n_head = {config.n_head} equal "
                         f"heads; type --n_head={near}, for instance")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}; type --dropout=P with 0 <= P < 1")

def check_length(block_size: int, positions: int) -> None:
    """ raise ValueError if sequences are longer than the model has positions """
    if block_size > positions:
        raise ValueError(f"block_size is {block_size}, but the model has {positions} positions; type "
                         f"--block_size={positions} or less")
