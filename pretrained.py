"""
Loads models from elsewhere, and their tokenizers: GPT-2 in Hugging Face's format, from a directory or the
hub, and in TensorFlow's, as OpenAI and gpt-2-simple save it.
"""
import contextlib
import glob
import json
import os
import re

import torch

from configurator import quote, say_once
from dataset import read_template
from model import GPT, GPT2_SHAPES, GPTConfig
from tokenizer import BPETokenizer

def load(source: str, dropout: float = 0.0) -> tuple[GPT, dict]:
    """ the model that `source` names, and {'tokenizer': its state}, with 'template' if it has one

    source is a Hugging Face directory; a GPT-2 name or a hub id, where name@REVISION picks a commit, tag or
    branch; or the folder, prefix or .index file of a TensorFlow checkpoint.
    """
    prefix = find_tensorflow(source)
    if prefix:
        return load_tensorflow(prefix, dropout), {'tokenizer': {'name': 'gpt2'}}
    name, revision = find_hugging_face(source)
    say_once(f"loading {source} ...")
    os.environ.setdefault('DISABLE_SAFETENSORS_CONVERSION', '1') # else transformers asks a service for it
    with readable(source):
        GPT.pretrained_config(name, revision) # first: without a network each file is slow to fail
        beside = {'tokenizer': read_tokenizer(name, revision)}
        model = GPT.from_pretrained(name, dropout, revision)
    template = read_template([source]) # if export.py wrote it
    return model, {**beside, 'template': template} if template is not None else beside

def config_of(source: str) -> GPTConfig:
    """ the shape of the model that `source` names, without reading its weights, except TensorFlow's """
    if find_tensorflow(source):
        return load(source)[0].config
    name, revision = find_hugging_face(source)
    with readable(source):
        return GPT.pretrained_config(name, revision)

# -----------------------------------------------------------------------------
# Hugging Face

HUB_NAMES = *GPT2_SHAPES, 'distilgpt2' # without an owner

def find_hugging_face(source: str) -> tuple[str, str]:
    """ (directory or hub id, revision) that `source` names; raises FileNotFoundError if it can be neither """
    folder = os.path.dirname(source) or '.' if source.endswith('.safetensors') else source
    if os.path.exists(source) and os.path.exists(os.path.join(folder, 'adapter_config.json')):
        raise FileNotFoundError(f"{folder} holds an adapter of PEFT, which is not read here; merge it into "
                                "its base there (merge_and_unload, save_pretrained), and type that folder")
    if os.path.isfile(source):
        raise FileNotFoundError(f"{source} is a model's weights alone; type --init_from={quote(folder)}, the "
                                "folder with its config.json")
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, 'config.json')):
        within = glob.glob(os.path.join(glob.escape(source), 'checkpoint-*', 'config.json')) # Trainer's
        latest = max(map(os.path.dirname, within), default='', key=lambda folder: (len(folder), folder))
        known = quote(latest) if latest else 'a folder that train.py wrote'
        raise FileNotFoundError(f"{source} holds neither ckpt.pt nor last.pt nor a Hugging Face model nor "
                                f"TensorFlow's; type {known}")
    name, revision = split_revision(source)
    on_hub = name in HUB_NAMES or re.fullmatch(r'[\w.-]+/[\w.-]+(?<!\.pt)', name)
    if not os.path.isdir(source) and not on_hub:
        raise FileNotFoundError(f"there is no model {source!r}; expected a checkpoint, a folder, a hub id "
                                f"(owner/name), or one of {', '.join(HUB_NAMES)}")
    return name, revision or 'main'

@contextlib.contextmanager
def readable(source: str):
    """ a context in which whatever transformers, safetensors and the network raise becomes an OSError """
    try:
        yield
    except Exception as error:
        why = str(error).strip().partition('\n')[0]
        do = 'take another folder' if os.path.isdir(source) else 'check the name and the network'
        raise OSError(f"cannot load {source} from Hugging Face's format or hub ({type(error).__name__}: "
                      f"{why}); expected a GPT-2 in a local directory or on the hub; {do}") from None

def split_revision(source: str) -> tuple[str, str | None]:
    """ 'gpt2@607a30d' -> ('gpt2', '607a30d'); an existing path keeps its @ """
    parts = re.fullmatch(r'([\w.-]+(?:/[\w.-]+)?)@([\w./-]+)', source)
    return parts.groups() if parts and not os.path.exists(source) else (source, None)

def read_tokenizer(source: str, revision: str) -> dict:
    """ the state of a model's tokenizer, GPT-2's if it has none; raises ValueError for an unknown one """
    from transformers.utils import cached_file
    files = {}
    for name in ('vocab.json', 'tokenizer.json', 'added_tokens.json'):
        path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path:
            with open(path, encoding='utf-8') as file:
                files[name] = json.load(file)
    added = files.pop('added_tokens.json', {})
    whole = files.get('tokenizer.json')
    if whole is not None:
        chars = read_chars(whole['model'])
        if chars:
            return {'name': 'char', 'chars': chars}
        added = {**{token['content']: token['id'] for token in whole.get('added_tokens', [])}, **added}
        files['tokenizer.json'] = whole['model']['vocab']
    gpt2 = {'Hello': 15496, 'er': 263, '\u0120the': 262, '\u0120world': 995} # \u0120 is a space
    for name, vocab in files.items():
        if any(vocab.get(token) != i for token, i in gpt2.items()):
            raise ValueError(f"its {name} is not GPT-2's vocabulary, nor one of characters as export.py "
                             "writes it; no other is prepared and sampled here")
    more = [token for token, i in added.items() if i >= BPETokenizer.n_vocab]
    if more:
        names = ', '.join(more[:5]) + (' ...' if len(more) > 5 else '')
        say_once(f"warning: its tokenizer adds {names} to GPT-2's tokens; here they are ordinary text")
    return {'name': 'gpt2'}

def read_chars(words: dict) -> list[str] | None:
    """ the characters in a tokenizer.json's 'model', or None if it has ids for anything else """
    if words.get('type') != 'WordLevel':
        return None
    chars = sorted(words['vocab'], key=words['vocab'].get)
    ids = [words['vocab'][char] for char in chars]
    return chars if ids == list(range(len(chars))) and all(len(char) == 1 for char in chars) else None

# -----------------------------------------------------------------------------
# TensorFlow

def find_tensorflow(source: str) -> str | None:
    """ the prefix of the checkpoint `source`, or of the latest one in that folder; None if there is none

    A prefix P stands for the files P.index, P.data-00000-of-00001 and P.meta.
    """
    prefix = source.removesuffix('.index')
    if os.path.isfile(prefix + '.index'):
        return prefix
    if os.path.exists(os.path.join(source, 'config.json')): # a Hugging Face model, with other files beside it
        return None
    try: # TensorFlow's note of the latest; its folder may have moved since
        with open(os.path.join(source, 'checkpoint'), encoding='utf-8') as file:
            latest = re.search(r'^model_checkpoint_path: "(?:.*[/\\])?([^/\\"]+)"', file.read(), re.M)
        named = os.path.join(source, latest[1]) if latest else ''
    except (OSError, UnicodeDecodeError):
        named = ''
    found = [path.removesuffix('.index') for path in glob.glob(os.path.join(glob.escape(source), '*.index'))]
    return named if named in found else max(found, key=lambda p: os.path.getmtime(p + '.index'), default=None)

def load_tensorflow(prefix: str, dropout: float) -> GPT:
    """ the GPT-2 in a TensorFlow checkpoint; raises ImportError if TensorFlow is not installed """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2') # or it prints a lot about the processor
    try:
        import tensorflow
    except ImportError:
        raise ImportError(f"{prefix} is a TensorFlow checkpoint, and the tensorflow package, which reads it, "
                          "is not installed; type pip install tensorflow") from None
    say_once(f"loading {prefix} ...")
    try:
        reader = tensorflow.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        config = read_shape(prefix, shapes, dropout)
        with torch.device('meta'):
            names = [name for name, _ in GPT(config).named_parameters()] # the tied head is not among them
        weights = {name: convert(reader.get_tensor(tensorflow_name(name))) for name in names}
        return GPT.from_weights(config, {**weights, 'lm_head.weight': weights['transformer.wte.weight']})
    except Exception as error: # whatever TensorFlow raises for a damaged file
        why = str(error).strip().partition('\n')[0]
        raise ValueError(f"cannot use {prefix} ({type(error).__name__}: {why}); expected a GPT-2 that "
                         "OpenAI's code or gpt-2-simple saved; type --init_from with another") from None

def read_shape(prefix: str, shapes: dict, dropout: float) -> GPTConfig:
    """ the sizes of a model, from its tensors' shapes and, for n_head, from hparams.json """
    n_vocab, n_embd = shapes['model/wte']
    n_layer = len({name.split('/')[1] for name in shapes if re.match(r'model/h\d+/', name)})
    path = os.path.join(os.path.dirname(prefix), 'hparams.json')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            n_head = json.load(file)['n_head']
    else:
        n_head = max(1, n_embd // 64)
        say_once(f"there is no {path}, so n_head is taken to be n_embd / 64 = {n_head}, as in OpenAI's GPT-2")
    return GPTConfig(shapes['model/wpe'][0], n_vocab, n_layer, n_head, n_embd, dropout, bias=True)

def tensorflow_name(name: str) -> str:
    """ 'transformer.h.0.attn.c_attn.weight' -> 'model/h0/attn/c_attn/w' """
    path, kind = name.removeprefix('transformer.').replace('h.', 'h', 1).replace('.', '/').rsplit('/', 1)
    kind = '/b' if kind == 'bias' else '' if path in ('wte', 'wpe') else '/g' if 'ln_' in path else '/w'
    return f'model/{path}{kind}'

def convert(array) -> torch.Tensor:
    """ TensorFlow's array as our tensor: a convolution of width 1, (1, in, out), becomes (out, in) """
    tensor = torch.tensor(array)
    return tensor[0].t().contiguous() if tensor.dim() == 3 else tensor
