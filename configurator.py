"""
Turns a script's top-level variables into its command line:

$ python train.py config/train_shakespeare_char.py --batch_size=32

Arguments apply from left to right. A .py argument is a config file, run as Python; --key=value sets
one option. The default in the script decides an option's type, and the comment beside it is its help.
"""
import ast
import contextlib
import difflib
import glob
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import tokenize
import traceback

ROOT = os.path.dirname(os.path.abspath(__file__))
# options of a single call of train.py, not of the run that it starts or resumes
OF_A_CALL = 'init_from', 'out_dir', 'overwrite', 'eval_only', 'dry_run'
# options of other programs that finetune, and what does that here: the first that a script has or, if it has
# a space before any =, words for train.py
ELSEWHERE = {
    **dict.fromkeys(('resume', 'resume_from_checkpoint'), ['init_from=resume --out_dir=ITS_FOLDER']),
    **dict.fromkeys(('model', 'model_name', 'model_name_or_path', 'base_model', 'restore_from'),
                    ['init_from=NAME']),
    **dict.fromkeys(('per_device_train_batch_size', 'train_batch_size', 'bs'), ['batch_size=N']),
    **dict.fromkeys(('seq_len', 'max_seq_length', 'context_length'), ['block_size=N']),
    **dict.fromkeys(('max_length', 'length'), ['max_new_tokens=N', 'block_size=N']),
    **dict.fromkeys(('save_steps', 'save_every', 'save_interval', 'eval_steps'), ['eval_interval=N']),
    **dict.fromkeys(('logging_steps', 'print_every'), ['log_interval=N']),
    **dict.fromkeys(('output', 'out'), ['to=PATH', 'name=NAME']),
    **dict.fromkeys(('val_fraction', 'val_set_size', 'test_size', 'validation_split'),
                    ['val_fraction=X', 'prepare the data with --val_fraction=X']),
    **dict.fromkeys(('val_input', 'val_file', 'validation_file', 'test_file', 'eval_file'),
                    ['val_input=PATH', 'prepare the data with --val_input=PATH']),
    **dict.fromkeys(('num_return_sequences', 'n'), ['num_samples=N']),
    **dict.fromkeys(('early_stopping', 'early_stopping_patience'), ['patience=N']),
    **dict.fromkeys(('warmup_steps', 'warmup_ratio'), ['warmup_iters=N']),
    **dict.fromkeys(('devices', 'num_gpus', 'world_size'), ['start it by torchrun --nproc_per_node=N']),
    **dict.fromkeys(('lora_r', 'peft', 'use_lora'), ['lora_rank=16']),
    'lr': ['learning_rate=X'], 'steps': ['max_iters=N'], 'max_steps': ['max_iters=N'],
    'epochs': ['num_epochs=N'], 'precision': ['dtype=NAME'], 'greedy': ['temperature=0'],
    'save_total_limit': ['keep_checkpoints=False'], 'train_file': ['dataset=NAME', 'input=PATH'],
    'gradient_checkpointing': ['plan=recompute'], 'fp16': ['dtype=float16'], 'bf16': ['dtype=bfloat16'],
    'target_modules': ['lora_targets=NAMES'], 'report_to': ['wandb_log=True'], 'prompt': ['start=TEXT'],
    'file': ['start=FILE:PATH', 'input=PATH']}
PATHS = 'init_from', 'out_dir', 'base', 'dataset', 'file', 'to' # options that name files

def configure(options: dict, argv: list[str] | None = None, at_least_1: tuple[str, ...] = (),
              resumes: bool = False, choices: dict[str, tuple[str, ...]] = {}) -> dict:
    """ override `options` (a script's globals()) in place, and return the final settings

    With `resumes` and init_from = 'resume', options not in argv keep what the run in out_dir was given.
    Raises ValueError for an unknown option, for a value of the wrong type or not among its `choices`, and
    for a number below 0, or below 1 if the option is in at_least_1.
    """
    sys.excepthook = report
    if resumes and hasattr(signal, 'SIGUSR1'): # it asks a run to save, and would end one that only starts
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr): # a name may have characters that the terminal's encoding lacks
        if hasattr(stream, 'reconfigure'): # not a notebook's
            stream.reconfigure(errors='backslashreplace')
    argv = sys.argv[1:] if argv is None else argv
    keys = [k for k, v in options.items() if not k.startswith('_') and type(v) in (bool, int, float, str)]
    if '--help' in argv or '-h' in argv:
        print(describe(options['__file__']))
        sys.exit(0)
    defaults = start = {k: options[k] for k in keys}
    typed, sources = {}, {} # sources: which argument each is from
    for arg in argv:
        settings = read_argument(arg, defaults | typed, defaults)
        typed.update(settings)
        sources.update(dict.fromkeys(settings, arg))
    if resumes and typed.get('init_from', defaults['init_from']) == 'resume':
        start = defaults | options_of_run(typed.get('out_dir', defaults['out_dir']), defaults, typed, sources)
    settings = start | typed
    for key, value in settings.items():
        check_range(key, value, least=int(key in at_least_1))
        if value not in choices.get(key, (value,)):
            raise ValueError(f"{key} is {value!r}; type --{key}=NAME with one of "
                             f"{', '.join(filter(None, choices[key]))}")
    options.update(settings)
    kept = '; '.join(f"{k} = {start[k]!r}" for k in keys if defaults[k] != start[k] == settings[k])
    say_once(kept and f"as before: {kept}")
    say_once('; '.join(f"{k} = {settings[k]!r}" for k in keys if start[k] != settings[k]))
    return settings

def say_once(text: str) -> None:
    """ print `text`, unless it is empty, in the first process of a run only """
    if text and os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError): # a full disk under a log
            print(text, file=sys.stderr, flush=True)

def options_of_run(out_dir: str, defaults: dict, typed: dict, sources: dict) -> dict:
    """ the options given to the run in out_dir, from its config.json, except those `typed` now; {} if the
    file does not hold them

    Raises ValueError if a config file, which is easily typed again, would replace the dataset.
    """
    path = os.path.join(out_dir, 'config.json')
    try:
        with open(path, encoding='utf-8') as file:
            settings = json.load(file)
        before = {**settings, **settings['given']} # as given, not as resolved on its machine
        kept = {k: match_type(k, before[k], defaults[k]) for k in defaults
                if k in before and k not in typed and k not in OF_A_CALL}
        was = match_type('dataset', before.get('dataset', ''), '')
    except (OSError, KeyError, TypeError):
        if os.path.isdir(out_dir): # else train.py says that there is no run
            say_once(f"no options of the run in {path}: what is not typed is the default")
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot use {path} ({error}); mend it, or delete it and type the run's options "
                         "again") from None
    source, now = sources.get('dataset', '--'), typed.get('dataset', '')
    trains = not (typed.get('eval_only') or typed.get('dry_run'))
    if was and trains and not source.startswith('--') and os.path.basename(now) != os.path.basename(was):
        raise ValueError(f"{source} names the dataset {now!r}, and the run in {out_dir} reads {was!r}; type "
                         f"--init_from=resume --out_dir={quote(out_dir)} without {source}, since the run "
                         f"keeps its options, or --dataset={quote(was)} or --dataset={quote(now)} after it")
    return kept

def read_argument(arg: str, current: dict, defaults: dict) -> dict:
    """ the settings from one argument: all that a config file assigns, or a single --key=value """
    if arg.startswith('--'):
        key, equals, text = arg[2:].partition('=')
        check_key(key, defaults, where='on the command line')
        if not equals:
            example = not defaults[key] if type(defaults[key]) is bool else 'VALUE'
            raise ValueError(f"{arg} has no value; type {arg}={example}, with = and no space")
        return {key: parse(key, text, defaults[key])}
    if not arg.endswith('.py'):
        is_model = arg.endswith('.pt') or os.path.exists(os.path.join(arg, 'last.pt'))
        key = ('init_from' if is_model and 'init_from' in defaults else # prepare.py has no out_dir
               'input' if os.path.exists(arg) and 'out_dir' not in defaults else '')
        if any(os.path.exists(path + '.py') for path in (arg, os.path.join(ROOT, arg))):
            raise ValueError(f"{arg!r} is no config file; did you mean {arg}.py?")
        raise ValueError(f"{arg!r} is neither a config file (*.py) nor an option; options are typed "
                         + (f"--{key}={quote(arg)}" if key in defaults else "--key=value"))
    names = run_file(arg, current) # so that a config can compute with what is set so far
    settings = {k: v for k, v in names.items() if not k.startswith('_') and not inspect.ismodule(v)
                and (k in defaults or not callable(v))}
    for key in settings:
        check_key(key, defaults, where=f'in {arg}')
    return {key: at_home(key, match_type(key, value, defaults[key])) for key, value in settings.items()}

def at_home(key: str, value):
    """ `value` with ~ in a path expanded to the user's home, which a shell does not do in --key=~/path """
    start = '(^|,)' if key in PATHS else '(^FILE:)'
    home = os.path.expanduser('~')
    return re.sub(start + r'~(?=[/\\]|$)', lambda m: m[1] + home, value) if isinstance(value, str) else value

class Names(dict):
    """ a config file's namespace, which records the variables that the file assigns """

    def __init__(self, *args):
        super().__init__(*args)
        self.assigned = set()

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.assigned.add(key)

def run_file(path: str, names: dict) -> dict:
    """ run a config file with the variables `names`, and return what it assigns; the path is relative to the
    current folder or the project's, and an error in the file becomes a one-line ValueError """
    if not os.path.exists(path) and os.path.exists(os.path.join(ROOT, path)):
        path = os.path.join(ROOT, path)
    try:
        with open(path, encoding='utf-8-sig') as file: # Windows' editors may begin it with a mark
            source = file.read()
    except OSError as error:
        ours = glob.glob(os.path.join('config', '**', '*.py'), root_dir=ROOT, recursive=True)
        files = [name for name in ours if 'finetune' in name or 'finetune' not in path]
        near = ([name for name in files if os.path.basename(name) == os.path.basename(path)]
                or difflib.get_close_matches(path, files, n=4, cutoff=0.5))
        hint = f"; did you mean {', '.join(sorted(near))}?" if near else ''
        raise ValueError(f"cannot read the config file {path} ({error.strerror}){hint}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; a config file is a few lines of Python") from None
    try:
        before, names = names, Names(names)
        exec(compile(source, path, 'exec'), names)
    except (Exception, SystemExit) as error:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno or 1 if isinstance(error, SyntaxError) else frames[-1] if frames else 0
        what = error.msg if isinstance(error, SyntaxError) else error
        hint = ', or import there what it uses' if isinstance(error, NameError) else ''
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {what}; mend that line"
                         + hint) from None
    # Python does not tell Names what a function assigns to a `global`
    return {k: v for k, v in names.items() if k in names.assigned or before.get(k, names) is not v}

def check_key(key: str, defaults: dict, where: str) -> None:
    """ raise ValueError, suggesting the closest name, if there is no such option """
    if key in defaults:
        return
    hints, in_file = ELSEWHERE.get(key, []), where.endswith('.py')
    known = [hint for hint in hints if hint.partition('=')[0] in defaults]
    words = [hint for hint in hints if ' ' in hint.partition('=')[0] and 'sample_interval' in defaults]
    near = (difflib.get_close_matches(key, defaults, n=1, cutoff=0.75)
            or [name for name in defaults if key in name.split('_') and len(key) > 2])
    hint = "--help lists every option"
    if known:
        hint = f"here it is {known[0].partition('=')[0]}" if in_file else f"type --{known[0]}"
    elif words:
        hint = words[0]
    elif near:
        hint = f"did you mean {', '.join(near)}?"
    if in_file:
        hint = f"a variable of the file's own begins with _, as _{key}; {hint}"
    raise ValueError(f"unknown option {key!r} {where}; {hint}")

def check_range(key: str, value, least: int) -> None:
    """ raise ValueError for a number below `least`, or a whole number that some library does not accept """
    limit = 32 if key == 'seed' else 31
    if type(value) is int and abs(value) >= 2**limit: # may have more digits than Python prints
        raise ValueError(f"{key} is {'above' if value > 0 else 'below'} all that is reasonable; type "
                         f"--{key}=N with N below 2**{limit}")
    if type(value) in (int, float) and value < least:
        raise ValueError(f"{key} is {value}; type --{key}=N with N at least {least}")

def parse(key: str, text: str, default):
    """ the value of --key=text; a text option takes it literally, so --start=5 is '5', unless it is nothing
    but \\n: those become line ends, so that --start='\\n' is the default that the help shows """
    if isinstance(default, str) and default != 'auto':
        return '\n' * (len(text) // 2) if re.fullmatch(r'(\\n)+', text) else at_home(key, text)
    try:
        value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = text
    return match_type(key, value, default)

def match_type(key: str, value, default):
    """ `value` as the type of `default`; an 'auto' option takes text, True or False; else ValueError """
    if type(default) is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(default) is int and type(value) is float and value.is_integer(): # such as 6e5
        value = int(value)
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; type a finite number, such as --{key}={default}")
    if default == 'auto' and type(value) in (bool, str):
        return value
    if type(value) is not type(default):
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[type(default)]
        raise ValueError(f"{key} is {value!r}; it takes {kind}, such as --{key}={default}")
    return value

def quote(text: str) -> str:
    """ `text` as one argument of a command that a user may type """
    if os.name == 'nt':
        return text if re.fullmatch(r'[\w.:/\\-]+', text) else f'"{text}"'
    return shlex.quote(text)

def script(name: str) -> str:
    """ a script of the project, as a user types it in the current folder """
    try:
        return quote(os.path.relpath(os.path.join(ROOT, name)))
    except ValueError: # another drive of Windows
        return quote(os.path.join(ROOT, name))

def read_options(script: str) -> tuple[str, list[tuple]]:
    """ a script's docstring and its options in order, (group, name, default, comment), read from its source
    without running it """
    with open(script, encoding='utf-8') as file:
        source = file.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokens if t.type == tokenize.COMMENT}
    lines, tree = source.splitlines(), ast.parse(source)
    ends = [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == 'configurator']
    nodes = {node.lineno: node for node in tree.body
             if isinstance(node, ast.Assign) and node.lineno < ends[0]}
    options, group = [], ''
    for n in range(tree.body[0].end_lineno + 1, ends[0]):
        if n in nodes and not nodes[n].targets[0].id.startswith('_'):
            name, default = nodes[n].targets[0].id, ast.literal_eval(nodes[n].value)
            options.append((group, name, default, comments.get(n, '')))
        elif lines[n - 1].startswith('#') and comments[n].strip('-'):
            group = comments[n]
    return (ast.get_docstring(tree) or '').strip(), options

def describe(script: str) -> str:
    """ the --help text: what the script does, then one line per option, under its group's heading """
    text, options = read_options(script)
    out = [text, f"\nusage: python {sys.argv[0]} [config/file.py] [--key=value ...]"]
    for group, members in itertools.groupby(options, key=lambda option: option[0]):
        out += [f"\n{group}"] if group else []
        out += [f"  --{name}={default!r}".ljust(43) + ' ' + comment for _, name, default, comment in members]
    return '\n'.join(out)

def reference(scripts: list[str]) -> str:
    """ docs/configuration-reference.md: every option of the scripts, in tables """
    kinds = {bool: 'True or False', int: 'whole number', float: 'number', str: 'text'}
    out = ["# Every option of every script", '',
           "An option is typed `--name=value`, or set in a config file, `name = value`. They apply from left "
           "to right, and the last one counts. `auto` lets the program choose.", '',
           "This page is printed by `python configurator.py` from the scripts themselves.", '']
    for script in scripts:
        text, options = read_options(os.path.join(ROOT, script))
        out += [f"## {script}", '', text.split('\n\n')[0].replace('\n', ' '), '',
                '| option | type | default | meaning |', '|---|---|---|---|']
        for group, members in itertools.groupby(options, key=lambda option: option[0]):
            out += [f"| **{group.partition(';')[0]}** | | | |"] if group else []
            for _, name, default, comment in members:
                kind = 'auto or one named' if default == 'auto' else kinds[type(default)]
                out.append(f"| `{name}` | {kind} | `{default!r}` | {comment} |".replace(
                    '<|endoftext|>', '`<\\|endoftext\\|>`'))
        out.append('')
    return '\n'.join(out)

def report(kind, error, trace) -> None:
    """ the scripts' sys.excepthook: an error that our own files raise on purpose is for the user, and becomes
    one line and exit status 2; one that a library raises is our bug, and keeps its traceback, except one
    about a file that this user may not use """
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, BrokenPipeError): # the reader has gone, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    frames = traceback.extract_tb(trace)
    raised_in = os.path.abspath(frames[-1].filename) if frames else ''
    ours = raised_in.startswith(ROOT + os.sep) and 'site-packages' not in raised_in
    device = sys.modules.get('device') # our device.py, which knows torch's messages
    told = (ours and issubclass(kind, (ValueError, OSError, ImportError))
            or issubclass(kind, PermissionError) and isinstance(error.filename, str))
    full = issubclass(kind, MemoryError) or not told and device and device.is_out_of_memory(error)
    if not (full or told):
        sys.__excepthook__(kind, error, trace)
        sys.exit(1)
    if os.environ.get('LOCAL_RANK', '0') != '0':
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3) # if other processes fail too, torchrun ends this one before it prints
    text = str(error)
    if full:
        known = []
        with contextlib.suppress(OSError, SyntaxError): # no script, as of python -c
            known = [name for _, name, _, _ in read_options(sys.argv[0])[1]]
        less = [name for name in ('num_samples', 'max_new_tokens', 'batch_size', 'block_size')
                if name in known]
        ways = [f"type a smaller --{' or --'.join(less)}"] if less else []
        if 'device' in known and kind is not MemoryError and 'CPUAllocator' not in text:
            ways.append("type --device=cpu")
        ways.append('take a smaller model' if 'init_from' in known else 'end other programs')
        text = f"out of memory ({text}); {', or '.join(ways)}"
    elif isinstance(error, OSError) and error.filename is not None: # the system's own words
        text = f"cannot use {error.filename} ({error.strerror}); type another path, or mend that one"
    if kind is ModuleNotFoundError:
        text += '; activate its environment (. .venv/bin/activate), or run pip install -r requirements.txt'
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)

if __name__ == '__main__':
    print(reference(['train.py', 'sample.py', 'evaluate.py', 'export.py', 'bench.py',
                     'data/custom/prepare.py', 'data/instruct/prepare.py', 'data/quickstart/prepare.py',
                     'data/shakespeare/prepare.py', 'data/shakespeare_char/prepare.py']), end='')
