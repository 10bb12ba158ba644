"""
Checkpoints: written whole or not at all, read without running what is in them, rebuilt into a model.

The file is nanoGPT's dict (model, optimizer, model_args, iter_num, best_val_loss, config) with our
tokenizer, scaler and version beside it.
"""
import contextlib
import json
import os
import re
import sys
from dataclasses import asdict

import torch

from model import GPT, GPT2_SHAPES, GPTConfig

VERSION = 1 # of the format; rises when an older reader would go wrong

def save(checkpoint: dict, path: str) -> None:
    """ write `path` so that it holds the old checkpoint or the new one, whenever the machine stops """
    try:
        with open(path + '.tmp', 'wb') as file:
            torch.save({**checkpoint, 'version': VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error: # torch raises RuntimeError where the disk is full
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        why = str(error).strip().splitlines()[0]
        raise OSError(f"cannot save {path} ({why}); what it held before is whole; make room on the disk, "
                      "then type --init_from=resume") from None

def link(path: str, to: str) -> None:
    """ let `to` be the same file as `path`, or a copy where the file system has no links """
    import shutil
    if os.path.exists(to + '.tmp'):
        os.remove(to + '.tmp')
    try:
        os.link(path, to + '.tmp')
    except OSError:
        shutil.copyfile(path, to + '.tmp')
    os.replace(to + '.tmp', to)

def find(source: str, names=('ckpt.pt', 'last.pt')) -> str | None:
    """ `source` if it is a file, or the first of `names` in the folder `source`; None where there is none """
    paths = [source] if os.path.isfile(source) else [os.path.join(source, name) for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)

def load(path: str) -> dict:
    """ a checkpoint of ours or nanoGPT's, on the CPU; raises ValueError where the file is anything else """
    with open(path, 'rb') as file:
        try:
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error: # a reader of damaged files may raise anything
            why = ("it holds more than tensors and plain values, and could run code" if 'GLOBAL' in str(error)
                   else "it is cut short, damaged or no checkpoint")
            raise ValueError(f"cannot use {path}: {why}; expected a file that train.py or nanoGPT wrote; "
                             "type --out_dir or --init_from with another") from None
    missing = [key for key in ('model', 'model_args')
               if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected a checkpoint of train.py or "
                         "nanoGPT; type --out_dir or --init_from with another")
    if checkpoint.get('version', VERSION) > VERSION:
        raise ValueError(f"{path} is of format {checkpoint['version']}, this program reads up to {VERSION}; "
                         "use a newer fitGPT")
    return checkpoint

def model_of(checkpoint: dict, path: str, dropout: float = 0.0) -> GPT:
    """ the model in a checkpoint, which gives its weights away """
    weights = {name.removeprefix('_orig_mod.'): tensor for name, tensor in checkpoint.pop('model').items()
               if not name.endswith('.attn.bias')} # the causal mask, which old nanoGPT stored
    try:
        return GPT.from_weights(GPTConfig(**{**checkpoint['model_args'], 'dropout': dropout}), weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit together: {error}; expected nanoGPT's names and shapes; "
                         "type --out_dir or --init_from with another") from None

def load_model(source: str, dropout: float = 0.0) -> tuple[GPT, dict]:
    """ the model that `source` names, and what is beside it in its checkpoint

    source is a checkpoint's path or its folder, a Hugging Face directory, a GPT-2 name or a hub id. For
    Hugging Face's the second is {'tokenizer': {'name': 'gpt2'}}; it has no 'tokenizer' if nanoGPT wrote it.
    """
    path = find(source)
    if path:
        checkpoint = load(path)
        return model_of(checkpoint, path, dropout), checkpoint
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, 'config.json')):
        raise FileNotFoundError(f"{source} holds neither ckpt.pt nor last.pt nor a Hugging Face model; "
                                "type a folder that train.py wrote")
    on_hub = source in GPT2_SHAPES or re.fullmatch(r'[\w.-]+/[\w.-]+', source)
    if not os.path.isdir(source) and not on_hub:
        raise FileNotFoundError(f"there is no model {source!r}; expected a checkpoint, a folder, a hub id or "
                                f"one of {', '.join(GPT2_SHAPES)}")
    print(f"loading {source} ...", file=sys.stderr)
    try:
        check_vocabulary(source)
        return GPT.from_pretrained(source, dropout), {'tokenizer': {'name': 'gpt2'}}
    except Exception as error: # whatever transformers, safetensors and the network raise
        why = str(error).strip().split('\n')[0]
        raise OSError(f"cannot load {source} from Hugging Face's format or hub ({type(error).__name__}: "
                      f"{why}); expected a GPT-2 in a local directory or on the hub; check the name and the "
                      "network") from None

def check_vocabulary(source: str) -> None:
    """ raise ValueError where a Hugging Face model brings a vocabulary, and it is not GPT-2's """
    from transformers.utils import cached_file
    for name in ('vocab.json', 'tokenizer.json'):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            with open(path, encoding='utf-8') as file:
                vocab = json.load(file)
            vocab = vocab['model']['vocab'] if name == 'tokenizer.json' else vocab
            gpt2 = {'Hello': 15496, 'er': 263, '\u0120the': 262, '\u0120world': 995} # \u0120 is a space
            if any(vocab.get(token) != i for token, i in gpt2.items()):
                raise ValueError(f"its {name} is not GPT-2's vocabulary, the only one that is prepared and "
                                 "sampled here")

def model_args(model: GPT) -> dict:
    """ nanoGPT's keys, from which its own code can rebuild the model """
    return asdict(model.config)
