"""
Reads checkpoints, without running code that is in them, and rebuilds their models. saver.py writes them.

The file is nanoGPT's dict (model, optimizer, model_args, iter_num, best_val_loss, config) plus entries of
ours, which docs/design.md lists. It is a zip file, which holds a checksum of each tensor.
"""
import contextlib
import copy
import math
import ntpath
import os
import posixpath
import re
import reprlib
import struct
import zipfile
from dataclasses import asdict, fields, replace

import torch

import lora
import pretrained
from configurator import OF_A_CALL, quote
from dataset import find_dataset, find_datasets, read_tokenizer_state
from model import GPT, GPT2_SHAPES, GPTConfig
from saver import VERSION, checkpoints_in
from tokenizer import BPETokenizer, check_match, count_ids, is_state

DEFAULTS = GPT2_SHAPES['gpt2'] | {'bias': False} # train.py's, of the options that a loaded model decides
OTHERS = " and the run's other options" # which a new run does not take over
KINDS = { # types of a checkpoint's entries
    **dict.fromkeys(('model', 'model_args', 'optimizer', 'config', 'tokenizer', 'scaler', 'lora'), dict),
    **dict.fromkeys(('template', 'launch', 'base'), str), 'lost': (int, float),
    **dict.fromkeys(('version', 'iter_num', 'best_iter', 'n_worse', 'evaluated', 'n_bad', *lora.SUMS), int),
    'best_val_loss': (int, float, torch.Tensor)}
OPTIONS = { # types of the options in its config; others may be anything but a tensor
    'dataset': str, 'init_from': (str, type(None)),
    **dict.fromkeys(('batch_size', 'gradient_accumulation_steps'), (int, float))}

def find(source: str) -> str | None:
    """ `source` if it is a file, else ckpt.pt or last.pt in that folder; None if there is none """
    if not source or source.endswith(('.index', '.safetensors')): # TensorFlow's, Hugging Face's
        return None
    paths = [source, os.path.join(source, 'ckpt.pt'), os.path.join(source, 'last.pt')]
    return next((path for path in paths if os.path.isfile(path)), None)

def source_of(init_from: str, out_dir: str) -> str:
    """ `init_from`, where 'resume' is the run in out_dir; FileNotFoundError if that has no checkpoint """
    if init_from != 'resume':
        return init_from
    if find(out_dir) is None:
        raise FileNotFoundError(f"there is no checkpoint in {out_dir}; train one with train.py "
                                f"--out_dir={quote(out_dir)}, type --out_dir with a run's folder, or "
                                "--init_from=gpt2")
    return out_dir

def damage(path: str) -> str | None:
    """ which bytes of a checkpoint are not as they were written, or None, by the checksums in the file, which
    torch.load does not check """
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04': # not a zip, or torch's old format
            return None
        try:
            parts = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, EOFError, struct.error):
            return (f"it is cut short at byte {os.path.getsize(path):,}; expected a list of all its parts at "
                    "the end")
        for part in parts.infolist():
            try:
                with parts.open(part) as content:
                    while content.read(2**24):
                        pass
            except Exception: # reading a damaged file may raise anything
                return (f"of its bytes the {part.file_size:,} from {part.header_offset:,} are not those "
                        f"that were written; expected the CRC-32 {part.CRC:08x}")

def load(path: str, moments: bool = False) -> dict:
    """ a checkpoint of ours or nanoGPT's, on the CPU; its optimizer, two thirds of the file, is loaded only
    with `moments`; raises ValueError for any other file """
    spoiled = damage(path)
    if spoiled:
        raise ValueError(f"{path} is damaged: {spoiled}; type --out_dir or --init_from with another")
    try:
        mapped = not moments and zipfile.is_zipfile(path) # torch's old format cannot be
        checkpoint = torch.load(path, map_location='cpu', mmap=mapped, weights_only=True)
        if not moments and isinstance(checkpoint, dict) and isinstance(checkpoint.get('optimizer'), dict):
            del checkpoint['optimizer']
        checkpoint = copy.deepcopy(checkpoint) if mapped else checkpoint # since the file may be replaced
    except Exception as error: # reading a damaged file may raise anything
        why = ("it holds more than tensors and plain values, and could run code" if 'GLOBAL' in str(error)
               else "it is cut short, damaged or no checkpoint")
        raise ValueError(f"cannot use {path}: {why}; expected a file that train.py or nanoGPT wrote; "
                         "type --out_dir or --init_from with another") from None
    missing = [key for key in ('model', 'model_args')
               if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected a checkpoint of train.py or "
                         "nanoGPT; type --out_dir or --init_from with another")
    checkpoint = {key: value for key, value in checkpoint.items() if value is not None}
    odd = next(misfits(checkpoint), None)
    if odd:
        raise ValueError(f"the {odd[0]} of {path} is {reprlib.repr(odd[1])}; expected a checkpoint of "
                         "train.py or nanoGPT; type --out_dir or --init_from with another")
    if checkpoint.get('version', VERSION) > VERSION:
        raise ValueError(f"{path} is of format {checkpoint['version']}, this program reads up to {VERSION}; "
                         "use a newer fitGPT")
    return checkpoint

def misfits(checkpoint: dict):
    """ yield the name and value of each entry, and each option in its config, that no run writes """
    for key, value in checkpoint.items():
        if (not isinstance(value, KINDS.get(key, object)) or key == 'iter_num' and value < 0
                or key == 'tokenizer' and not is_state(value)
                or key == 'best_val_loss' and isinstance(value, torch.Tensor) and value.numel() != 1):
            yield key, value
        elif key == 'config':
            yield from ((f"config's {name}", its) for name, its in value.items()
                        if not isinstance(its, OPTIONS.get(name, object)) or isinstance(its, torch.Tensor))

def take_weights(checkpoint: dict) -> dict:
    """ take the tensors by name out of a checkpoint; raises TypeError if one is not a plain float tensor """
    weights = checkpoint.pop('model')
    for name, tensor in weights.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                and tensor.layout == torch.strided and tensor.device.type == 'cpu'):
            raise TypeError(f'{name} is no tensor of numbers')
    return weights

def model_of(checkpoint: dict, path: str, dropout: float) -> GPT:
    """ build the model in a checkpoint, taking the weights out of it """
    try:
        weights = {name.removeprefix('module.').removeprefix('_orig_mod.'): tensor
                   for name, tensor in take_weights(checkpoint).items()
                   if not name.endswith('.attn.bias')} # the causal mask, which old nanoGPT stored
        return GPT.from_weights(GPTConfig(**{**checkpoint['model_args'], 'dropout': dropout}), weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit together: {error}; expected nanoGPT's names and shapes; "
                         "type --out_dir or --init_from with another") from None

def find_base(base: str, path: str) -> str:
    """ where the base of the checkpoint in `path` is now, which was at `base` """
    is_path = posixpath.isabs(base) or ntpath.isabs(base) # else it is on the hub
    if is_path and not os.path.exists(base): # both folders were moved
        beside, parts = os.path.dirname(os.path.dirname(os.path.realpath(path))), re.split(r'[\\/]', base)
        near = [os.path.join(beside, *parts[-n:]) for n in (2, 1)]
        base = next((there for there in near if os.path.exists(there)), base)
    return base

def adapted_model(checkpoint: dict, path: str, dropout: float, merge: bool) -> GPT:
    """ the base model of a LoRA checkpoint with its adapter, merged into the weights or beside them """
    base = checkpoint.get('base')
    if base is None:
        raise ValueError(f"{path} does not say which model its adapter is for; type --out_dir with another")
    try:
        model, beneath = load_model(base, dropout)
    except OSError as error:
        why = f'cannot be had: {error}' if os.path.exists(base) or not os.path.isabs(base) else 'is missing'
        raise FileNotFoundError(f"{path} holds an adapter for {base}, which {why}; put it there, or its "
                                "folder beside the adapter's") from None
    if not lora.is_base(model, beneath, checkpoint):
        raise ValueError(f"{base} is no longer the model that the adapter in {path} was trained on; put "
                         "that one back there")
    try:
        lora.add(model, **checkpoint['lora'])
        lora.load(model, take_weights(checkpoint))
        below = checkpoint.get('base_adapter', checkpoint.get('base_fingerprint', 0)) # the base's
        checkpoint['fingerprint'] = lora.fingerprint(lora.adapter(model).values(), below)
    except (RuntimeError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not fit together: {error}; type --out_dir with another") from None
    if merge:
        lora.merge(model)
    return model

def tokenizer_beside(path: str, vocab_size: int) -> dict:
    """ {'tokenizer': its state} if a meta.pkl of so many tokens lies beside a checkpoint; else {} """
    with contextlib.suppress(ValueError, OSError): # another program's
        state = read_tokenizer_state(os.path.dirname(os.path.abspath(path)))
        if state['name'] != 'gpt2' and count_ids(state) == vocab_size:
            return {'tokenizer': state}
    return {}

def load_model(source: str, dropout: float = 0.0, merge: bool = True,
               moments: bool = False) -> tuple[GPT, dict]:
    """ the model that `source` names, and the rest of its checkpoint, with the optimizer only if `moments`;
    a LoRA adapter is merged into the weights, or kept beside them

    source is a checkpoint, its folder, or anything that pretrained.load takes. The rest has no 'tokenizer'
    if nanoGPT wrote the checkpoint and no meta.pkl lies beside it.
    """
    path = find(source)
    if path:
        checkpoint = load(path, moments)
        checkpoint = {**tokenizer_beside(path, checkpoint['model_args'].get('vocab_size')), **checkpoint}
        if 'base' in checkpoint:
            checkpoint['base'] = find_base(checkpoint['base'], path)
        model = (adapted_model(checkpoint, path, dropout, merge) if 'lora' in checkpoint else
                 model_of(checkpoint, path, dropout))
        return model, checkpoint
    return pretrained.load(source, dropout)

def resume(out_dir: str, config: dict, say) -> tuple[GPT, dict]:
    """ what `latest` returns; in `config`, the options now, sets shape and init_from to those that the run
    began with; with other data, patience starts anew; raises ValueError if the options add an adapter """
    model, loaded = latest(out_dir, config['dropout'], say, moments=not config['eval_only'])
    if config['lora_rank'] and 'lora' not in loaded:
        raise ValueError(f"the run in {out_dir} has no adapter, and lora_rank is {config['lora_rank']}; type "
                         f"--lora_rank=0, or --init_from={quote(out_dir)} --out_dir=ANOTHER")
    before = loaded.get('config', {})
    config.update({key: before[key] for key in ('init_from', *DEFAULTS) if key in before})
    if not is_same_data(before, config):
        loaded['n_worse'] = 0
    return model, loaded

def to_resume(out_dir: str) -> list[str]:
    """ the checkpoints that the run in out_dir can resume from, latest first; raises FileNotFoundError if
    there is none, ValueError if out_dir is no folder """
    check_folder(out_dir)
    paths = checkpoints_in(out_dir)
    if not paths:
        raise FileNotFoundError(f"there is no checkpoint in {out_dir} to resume; type --out_dir with a run's "
                                "folder, or --init_from=scratch to start one")
    return paths

def latest(out_dir: str, dropout: float, say, moments: bool) -> tuple[GPT, dict]:
    """ what load_model returns for a run's last.pt, or for its ckpt.pt if last.pt is damaged, to resume from

    Raises FileNotFoundError if there is neither, ValueError if none can be used.
    """
    paths = to_resume(out_dir)
    try:
        return load_model(paths[0], dropout, False, moments)
    except ValueError as error:
        if len(paths) == 1:
            raise
        say(f"warning: {str(error).partition('; type')[0]}")
    try:
        say(f"going on from {paths[1]}, the best so far, instead")
        return load_model(paths[1], dropout, False, moments)
    except ValueError as error:
        raise ValueError(f"{paths[0]} cannot be used, and neither can the other: {error}") from None

def way_back(out_dir: str, dtype: str) -> str:
    """ what to type after iterations that were not finite: start anew from the best model of out_dir, since
    a later one may be spoiled, or, if there is none, repeat the same command """
    path = find(out_dir)
    again = f"--init_from={quote(path)} --out_dir=ANOTHER{OTHERS}" if path else 'the same'
    again += ' with a lower --learning_rate' + ('' if dtype == 'float32' else ', or --dtype=float32')
    return f"nothing of them is in a checkpoint of {out_dir}; type {again}"

def peek(path: str) -> dict:
    """ a checkpoint whose tensors stay on the disk; {} if it cannot be read that way """
    with contextlib.suppress(Exception): # damaged, another program's, or missing
        return dict(torch.load(path, map_location='cpu', mmap=True, weights_only=True))
    return {}

def is_of(out_dir: str, launch: str | None) -> bool:
    """ whether the run in out_dir was started by this same command in this same torchrun job """
    return launch is not None and any(peek(path).get('launch') == launch for path in checkpoints_in(out_dir))

def config_of(source: str, out_dir: str, asked: dict, say=print) -> GPTConfig:
    """ the shape of the model that `source` names, without its weights, and the dropout `asked` for; 'resume'
    is the run in out_dir, 'scratch' the shape asked for; `say` tells where a loaded one differs """
    asked = {field.name: asked[field.name] for field in fields(GPTConfig)}
    config = GPTConfig(**asked) if source == 'scratch' else read_config(source, out_dir)
    kept = [f'{key} stays {getattr(config, key)}, not {asked[key]}' for key, default in DEFAULTS.items()
            if asked[key] not in (default, getattr(config, key))]
    if kept:
        say(f"warning: a loaded model keeps its shape: {'; '.join(kept)}")
    return replace(config, dropout=asked['dropout'])

def read_config(source: str, out_dir: str) -> GPTConfig:
    """ config_of for what is not from scratch """
    name, _ = pretrained.split_revision(source)
    if name in GPT2_SHAPES and not os.path.exists(source):
        return GPTConfig(**GPT2_SHAPES[name])
    paths = to_resume(out_dir) if source == 'resume' else [find(source)]
    if paths == [None]:
        return pretrained.config_of(source)
    for path in paths:
        with contextlib.suppress(Exception), torch.device('meta'): # built, to reject an n_embd of 16.0
            return GPT(GPTConfig(**peek(path)['model_args'])).config
    # an old format, or damaged: a full load reads the one and reports the other, unless it can still resume
    return (latest(out_dir, 0.0, lambda text: None, False) if source == 'resume'
            else load_model(source))[0].config

def find_tokenizer(loaded: dict, vocab_size: int) -> dict:
    """ the tokenizer state for what load_model returned; nanoGPT's checkpoints only name their dataset

    Raises FileNotFoundError if the dataset's characters are missing, ValueError if they are not the model's.
    """
    trained_on = loaded.get('config', {}).get('dataset', '')
    state = loaded.get('tokenizer') or read_tokenizer_state(find_dataset(trained_on))
    if 'tokenizer' not in loaded and state['name'] == 'gpt2' and vocab_size < BPETokenizer.n_vocab:
        raise FileNotFoundError(f"the checkpoint has {vocab_size} ids and does not say which characters they "
                                "are; put the meta.pkl of its dataset beside it")
    check_match(state, vocab_size, state, 'its dataset')
    return state

def needs(source: str, place: str) -> bool:
    """ whether the model that `source` names, or a base that it is an adapter for, is `place` or is in it """
    seen = []
    while isinstance(source, str) and source not in seen:
        path = find(source)
        # its name on the hub counts, too: from then on, it would mean this folder
        at = [source, os.path.dirname(path)] if path else [source]
        if os.path.realpath(place) in map(os.path.realpath, at):
            return True
        seen.append(source)
        checkpoint = peek(path) if path else {}
        source = checkpoint.get('base') if 'lora' in checkpoint else None
    return False

def check_folder(out_dir: str) -> None:
    """ raise ValueError if out_dir cannot be a run's folder """
    if not out_dir or os.path.isfile(out_dir):
        folder = os.path.dirname(out_dir) if out_dir.endswith('.pt') else ''
        raise ValueError(f"out_dir is {f'a file, {out_dir}' if out_dir else 'empty'}; expected a run's "
                         f"folder; type --out_dir={quote(folder) if folder else 'FOLDER'}")

def check_new(out_dir: str, init_from: str, overwrite: bool) -> None:
    """ raise FileExistsError if a new run in out_dir would overwrite what is there: a run, the model it
    starts from, or another program's files; ValueError if out_dir is no folder """
    check_folder(out_dir)
    if init_from != 'scratch' and needs(init_from, out_dir):
        raise FileExistsError(f"init_from, {init_from}, or what it is an adapter for, is out_dir or lies in "
                              "it; type --init_from=resume to go on with a run, or --out_dir=ANOTHER")
    if find(out_dir) and not overwrite:
        raise FileExistsError(f"{out_dir} already holds a run; type --init_from=resume to go on with it, "
                              "--out_dir=ANOTHER to keep it, or --overwrite=True to lose it")
    settings = os.path.join(out_dir, 'config.json')
    if os.path.exists(settings):
        with open(settings, encoding='utf-8', errors='replace') as file:
            is_ours = '"init_from"' in file.read()
        theirs = [] if is_ours else ['config.json']
    else:
        theirs = [name for name in ('log.csv', 'loss.png', 'report.md')
                  if os.path.exists(os.path.join(out_dir, name))]
    if theirs:
        raise FileExistsError(f"{os.path.join(out_dir, theirs[0])} is not of train.py, which would write its "
                              "own; type --out_dir=ANOTHER")

def describe_base(source: str, model: GPT, adapts: bool, loaded: dict) -> dict:
    """ what a run's checkpoints store about its base, the model that `source` names: an adapter's is a
    checkpoint, not its folder; a resumed run's is in `loaded`. Raises ValueError if an adapter has none. """
    if source == 'resume':
        return {key: loaded[key] for key in ('base', *lora.SUMS) if key in loaded}
    if source == 'scratch':
        if adapts:
            raise ValueError("lora_rank needs a model to start from; type --init_from=gpt2, or --lora_rank=0")
        return {}
    source = adapts and find(source) or source
    is_path = os.path.exists(source) or pretrained.find_tensorflow(source) # else it is on the hub
    return {'base': os.path.abspath(source) if is_path else source, **lora.known_by(model, loaded)}

def tell_changes(before: dict, config: dict) -> str:
    """ which options differ from those of the resumed run, as text for its first line

    Raises ValueError if other parts are frozen, since the moments would belong to other parameters, or if an
    iteration has another number of sequences, since that number tells how much of the data was read.
    """
    last = os.path.join(config['out_dir'], 'last.pt')
    source = last if os.path.isfile(last) else config['out_dir']
    anew = f"--init_from={quote(source)} --out_dir=ANOTHER{OTHERS}"
    was, now = ([c.get(key, 0) for key in ('batch_size', 'gradient_accumulation_steps')]
                for c in (before, config))
    if math.prod(was) not in (0, math.prod(now)) and not config['eval_only']:
        raise ValueError(f"an iteration of this run is {was[0]} x {was[1]} sequences (batch_size x "
                         f"gradient_accumulation_steps), not {now[0]} x {now[1]}; keep the product, or type "
                         f"{anew} to start anew from its weights")
    if (before.get('freeze') or '') != config['freeze']:
        raise ValueError(f"the run froze {before.get('freeze') or 'nothing'}, and freeze is "
                         f"{config['freeze']!r}; type --freeze={before.get('freeze', '')}, or {anew} to "
                         "start anew from its weights")
    not_options = (*OF_A_CALL, 'data', *DEFAULTS)
    changed = [f"{key} {before[key]!r} -> {config[key]!r}" for key in config
               if key not in not_options and before.get(key, config[key]) != config[key]]
    told = f", with {', '.join(changed)}" if changed else ''
    if not (is_same_data(before, config) or config['eval_only']):
        earlier = 'other windows of ' if before['dataset'] == config['dataset'] else ''
        told += f"; the best so far was judged by {earlier}{before['dataset']}: to count anew, type {anew}"
    return told

def is_same_data(before: dict, config: dict) -> bool:
    """ whether a resumed run continues with the same data, however its folders are named """
    if before.get('data', config['data']) != config['data']:
        return False
    names = before.get('dataset', config['dataset']), config['dataset']
    was, now = ({os.path.abspath(folder): round(weight / sum(its.values()), 6)
                 for folder, weight in its.items()} for its in map(find_datasets, names))
    return was == now

def adapter_state(model: GPT) -> dict:
    """ what a LoRA checkpoint holds in place of the weights """
    return {'model': lora.adapter(model), 'lora': lora.settings(model)}

def model_args(model: GPT) -> dict:
    """ nanoGPT's keys, from which its own code can rebuild the model """
    return asdict(model.config)
