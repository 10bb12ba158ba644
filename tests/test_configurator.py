import ast
import contextlib
import io
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ROOT, configure, read_argument, report, run_file, script

DEFAULTS = {'batch_size': 12, 'learning_rate': 6e-4, 'compile': 'auto', 'decay_lr': True, 'start': '\n'}

def read(arg):
    return read_argument(arg, dict(DEFAULTS), DEFAULTS)

@pytest.mark.parametrize('arg, expected', [
    ('--batch_size=4', {'batch_size': 4}), ('--learning_rate=1', {'learning_rate': 1.0}),
    ('--learning_rate=1e-3', {'learning_rate': 1e-3}), ('--decay_lr=False', {'decay_lr': False}),
    ('--decay_lr=true', {'decay_lr': True}), ('--start=a=b', {'start': 'a=b'}),
    ('--start=5', {'start': '5'}), ('--start=\\n\\n', {'start': '\n\n'}),
    ('--start=\\nabla', {'start': '\\nabla'}), ('--start=', {'start': ''}),
    ('--compile=False', {'compile': False}), ('--compile=auto', {'compile': 'auto'})])
def test_an_option_takes_the_type_of_its_default(arg, expected):
    got = read(arg)
    assert got == expected and type(list(got.values())[0]) is type(list(expected.values())[0])

@pytest.mark.parametrize('arg, message', [
    ('--batchsize=4', "unknown option 'batchsize' on the command line; did you mean batch_size"),
    ('--zzz=4', '--help lists every option'), ('--batch_size=4.5', 'takes a whole number'),
    ('--batch_size=four', 'takes a whole number'), ('--batch_size=True', 'takes a whole number'),
    ('--batch_size=', 'takes a whole number'), ('--decay_lr=1', 'takes True or False'),
    ('--batch_size', 'has no value'), ('--learning_rate=1e999', 'type a finite number'),
    ('--compile=3', 'takes text'), ('-x', 'neither a config file'),
    ('batch_size=4', 'neither a config file'), ('--batch_size=' + '(' * 5000, 'takes a whole number')])
def test_a_bad_argument_is_told(arg, message):
    with pytest.raises(ValueError) as error:
        read(arg)
    assert message in str(error.value)

OPTIONS = {'size': 1, 'rate': 0.5, 'flag': True, 'mode': 'auto', 'text': '\n', 'seed': 0} # one of each kind
# a command line may hold halves of surrogate pairs, too
ANY_TEXT = st.text(st.characters(exclude_categories=()))
TYPED = st.one_of(ANY_TEXT, st.integers().map(repr), st.floats().map(repr), st.booleans().map(repr),
                  st.integers(2**31 - 2, 2**32 + 2).map(hex), st.integers(300, 400).map('1e{}'.format),
                  st.integers(4000, 5000).map(lambda n: '9' * n),
                  st.text('0123456789+-_.eEjxbo()[]{}:,\'"# \n\\', max_size=9))
RIGHT = {'size': st.integers(0, 2**31 - 1), 'rate': st.floats(0, allow_infinity=False), 'flag': st.booleans(),
         'mode': st.sampled_from(['auto', 'offload', True, False]), 'text': ANY_TEXT,
         'seed': st.integers(0, 2**32 - 1)}

def call_with(*argv):
    """ the settings, or the status and what is printed, as of a script with OPTIONS """
    printed, hook = io.StringIO(), sys.excepthook
    try:
        with contextlib.redirect_stderr(printed):
            return configure(dict(OPTIONS), list(argv))
    except Exception as error:
        with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as left:
            report(type(error), error, error.__traceback__)
        return left.value.code, printed.getvalue()
    finally:
        sys.excepthook = hook

@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(OPTIONS)), TYPED)
def test_whatever_is_typed_is_of_the_right_type_or_refused_in_one_line(key, typed):
    got = call_with(f'--{key}={typed}')
    if isinstance(got, dict):
        assert got == {**OPTIONS, key: got[key]}
        assert type(got[key]) in ((str, bool) if key == 'mode' else (type(OPTIONS[key]),))
        limits = {'size': 2**31, 'seed': 2**32, 'rate': float('inf')}
        assert key not in limits or 0 <= got[key] < limits[key]
        assert (key != 'text'
                or got[key] == (typed if typed.replace('\\n', '') else typed.replace('\\n', '\n')))
    else:
        status, printed = got
        assert (key != 'text' and status == 2
                and printed.startswith(f'error: {key} is ') and printed.count('\n') == 1)

def test_a_file_that_its_user_may_not_read_is_told_in_one_line_also_where_numpy_opens_it(capsys):
    with pytest.raises(PermissionError) as raised:
        exec(compile("raise PermissionError(13, 'Permission denied', 'data/novel/train.bin')",
                     '/lib/python3/numpy/memmap.py', 'exec'))
    with pytest.raises(SystemExit) as left:
        report(raised.type, raised.value, raised.tb)
    assert left.value.code == 2 and capsys.readouterr().err == (
        'error: cannot use data/novel/train.bin (Permission denied); type another path, or mend that one\n')

@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(list(RIGHT))
                .flatmap(lambda key: st.tuples(st.just(key), RIGHT[key], st.booleans())), max_size=6))
def test_right_values_arrive_unchanged_and_the_last_of_an_option_counts(tmp_path_factory, given):
    folder, argv = tmp_path_factory.mktemp('configs'), []
    for n, (key, value, in_a_file) in enumerate(given):
        argv.append(str(folder / f'{n}.py') if in_a_file else f'--{key}={value}')
        if in_a_file:
            (folder / f'{n}.py').write_text(f'{key} = {value!r}', encoding='utf-8')
    assert call_with(*argv) == {**OPTIONS, **{key: value for key, value, _ in given}}

def test_a_config_computes_and_may_import_and_define(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text("import math\n_k = 2\ndef half(x): return x // 2\n"
                    "batch_size = half(_k * 8) + batch_size\nlearning_rate = 1\ncompile = False\n")
    assert read(str(path)) == {'batch_size': 20, 'learning_rate': 1.0, 'compile': False}

def test_a_config_s_function_may_assign_by_global(tmp_path):
    path = tmp_path / 'c.py'
    path.write_text('batch_size = 3\ndef _f():\n    global batch_size, learning_rate\n'
                    '    batch_size, learning_rate = 5, 0.5\n_f()\n')
    assert read(str(path)) == {'batch_size': 5, 'learning_rate': 0.5} # the last of each

@pytest.mark.parametrize('text, message', [
    ('batch_sise = 4', 'did you mean batch_size'), ('tokens = 4', "file's own begins with _, as _tokens"),
    ('batch_size = torch.x', "name 'torch' is not defined; mend that line, or import there what it uses"),
    ('batch_size = "4"', 'takes a whole number'), ('batch_size = ', 'line 1: SyntaxError'),
    ('\nbatch_size = x', 'line 2: NameError'),
    ('import nothing_of_this_name', 'line 1: ModuleNotFoundError')])
def test_a_bad_config_is_told(tmp_path, text, message):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(ValueError) as error:
        read(str(tmp_path / 'c.py'))
    assert message in str(error.value)

def test_a_config_of_the_project_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.py').write_text('batch_size = 2e2', encoding='utf-8-sig') # as Windows' Notepad may save it
    assert read('c.py')['batch_size'] == 200 and type(read('c.py')['batch_size']) is int
    assert run_file('config/quickstart.py', {})['out_dir'] == 'out-quickstart'

def test_a_script_is_named_as_it_is_typed_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert script('train.py') == 'train.py'
    monkeypatch.chdir(os.path.join(ROOT, 'data'))
    assert script('train.py') == os.path.join('..', 'train.py')

def test_a_missing_config_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match='did you mean .*config/finetune/gpt2_medium.py'):
        read('config/finetune_gpt2_medium.py')
    with pytest.raises(ValueError, match='did you mean .*config/train_shakespeare_char.py'):
        read('config/train_shakespeare.py')
    (tmp_path / 'binary.py').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='not text in UTF-8'):
        read(str(tmp_path / 'binary.py'))

SCRIPT = """
from configurator import configure
# options
size = 1 # how large
rate = 0.5
configure(globals())
"""

RESUMES = SCRIPT.replace(
    'configure(globals())', "init_from = 'scratch'\nout_dir = '.'\nconfigure(globals(), resumes=True)\n")

def call(tmp_path, body, *args, script=SCRIPT):
    (tmp_path / 'script.py').write_text(f'import sys; sys.path.insert(0, {ROOT!r})' + script + body)
    return subprocess.run([sys.executable, 'script.py', *args], cwd=tmp_path, capture_output=True,
                          encoding='utf-8')

def test_arguments_apply_from_left_to_right(tmp_path):
    (tmp_path / 'c.py').write_text('size = 5; rate = size / 2')
    assert call(tmp_path, 'print(size, rate)', '--size=2', 'c.py', '--rate=3').stdout == '5 3.0\n'
    assert call(tmp_path, 'print(size, rate)', 'c.py', '--size=2').stdout == '2 2.5\n'

def test_the_options_typed_are_told_by_one_of_a_run_s_processes(monkeypatch, capsys):
    for rank, told in (('0', 'batch_size = 4\n'), ('1', '')):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook) # configure sets it
        configure(dict(DEFAULTS), ['--batch_size=4'])
        assert capsys.readouterr().err == told

def test_a_resumed_run_s_options_come_before_those_of_a_config_and_the_command_line(tmp_path):
    (tmp_path / 'c.py').write_text('size = size + 1')
    (tmp_path / 'config.json').write_text(
        '{"size": 9, "rate": 2, "init_from": "gpt2", "other": [], "given": {"size": 5}}')
    def printed(*args):
        return call(tmp_path, 'print(size, rate, init_from)', *args, script=RESUMES).stdout
    assert printed('--rate=3', 'c.py') == '2 3.0 scratch\n'
    assert printed('--init_from=resume') == '5 2.0 resume\n'
    # a file computes from the defaults, each time
    assert printed('c.py', '--rate=0.5', '--init_from=resume') == '2 0.5 resume\n'
    assert printed('--init_from=resume', '--out_dir=none') == '1 0.5 resume\n'

@pytest.mark.parametrize('text, message', [
    ('{', 'config.json (Expecting'), ('[' * 100000, 'config.json (maximum recursion'), ('[]', ''), ('{}', ''),
    ('{"given": 3}', ''), ('{"size": "x"}', ''),
    ('{"size": "x", "given": {}}', "size is 'x'; it takes a whole number"),
    ('{"rate": NaN, "given": {}}', 'rate is nan')])
def test_a_config_json_that_no_run_wrote_is_passed_over_or_told(tmp_path, text, message):
    (tmp_path / 'config.json').write_text(text)
    done = call(tmp_path, '', '--init_from=resume', script=RESUMES)
    if message:
        assert message in done.stderr and done.returncode == 2 and done.stderr.count('\n') == 1
    else:
        told = (f"no options of the run in .{os.sep}config.json: what is not typed is the default\n"
                "init_from = 'resume'\n")
        assert (done.returncode, done.stderr) == (0, told)
    assert (call(tmp_path, '', '--init_from=resume', '--size=3', '--rate=3', script=RESUMES).returncode
            == (2 if text[1:] in ('', '[' * 99999) else 0))

def test_a_config_typed_again_does_not_change_a_resumed_run_s_dataset(tmp_path):
    script = RESUMES.replace('init_from', "dataset = 'openwebtext'\ninit_from")
    (tmp_path / 'config.json').write_text('{"dataset": "my novel", "size": 9, "given": {}}')
    (tmp_path / 'c.py').write_text("dataset = 'shakespeare'; size = 3")
    def resume(*args):
        return call(tmp_path, 'print(dataset, size)', *args, '--init_from=resume', script=script)
    refused = resume('c.py')
    assert refused.returncode == 2 and refused.stderr.endswith(
        "error: c.py names the dataset 'shakespeare', and the run in . reads 'my novel'; "
        "type --init_from=resume --out_dir=. without c.py, since the run keeps its options, or "
        "--dataset='my novel' or --dataset=shakespeare after it\n")
    assert (resume('c.py', '--dataset=other').stdout == 'other 3\n'
            and resume('c.py', '--dataset=my novel').stdout == 'my novel 3\n')
    assert resume('--size=4').stdout == 'my novel 4\n'

def test_what_the_terminal_s_encoding_lacks_is_written_out(tmp_path):
    (tmp_path / 'script.py').write_text(
        f'import sys; sys.path.insert(0, {ROOT!r})' + SCRIPT + "print('\u5c0f')", encoding='utf-8')
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, capture_output=True,
                          env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
    assert done.stdout.split() == [rb'\u5c0f'] and not done.returncode

def test_a_library_s_error_keeps_its_traceback_and_ctrl_c_has_none(tmp_path):
    bug = call(tmp_path, 'import json; json.loads("{")')
    assert bug.returncode == 1 and 'Traceback' in bug.stderr
    stopped = call(tmp_path, 'raise KeyboardInterrupt')
    assert stopped.returncode == 130 and stopped.stderr == ''

def test_every_config_sets_only_options_of_train_py():
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as file:
        tree = ast.parse(file.read())
    defaults = {node.targets[0].id: node.value.value for node in tree.body if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)}
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(ROOT, 'config'))
             for name in names if name.endswith('.py')]
    assert len(paths) >= 10
    for path in paths:
        assert read_argument(path, dict(defaults), defaults) != defaults

def test_the_home_folder_is_found_in_paths_and_nowhere_else():
    home = os.path.expanduser('~')
    options = {'out_dir': 'out', 'dataset': 'x', 'start': '', 'input': '', 'lora_targets': ''}
    argv = ['--out_dir=~/out', '--dataset=~/a:0.5,~/b~c:0.5', '--start=~/ is home', '--input=~/.ssh?',
            '--lora_targets=~/x']
    assert configure(dict(options), argv) == {
        'out_dir': f'{home}/out', 'dataset': f'{home}/a:0.5,{home}/b~c:0.5', 'start': '~/ is home',
        'input': '~/.ssh?', 'lora_targets': '~/x'}
    assert configure(dict(options), ['--start=FILE:~/x.txt', '--out_dir=~'])['start'] == f'FILE:{home}/x.txt'
    assert configure(dict(options), [r'--out_dir=~\x'])['out_dir'] == rf'{home}\x' # Windows'

def test_an_option_without_a_value_is_told_one_that_means_something():
    for options, argv, message in (
            ({'stream': False}, ['--stream'], 'type --stream=True,'),
            ({'out_dir': 'out'}, ['--out_dir', 'x'], 'type --out_dir=VALUE, with = and no space')):
        with pytest.raises(ValueError, match=message):
            configure(options, argv)

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="only Linux has a file that is always full")
def test_a_log_on_a_full_disk_does_not_end_a_script(tmp_path):
    (tmp_path / 'script.py').write_text(
        f'import sys; sys.path.insert(0, {ROOT!r})' + SCRIPT + "open('ran', 'w')")
    with open('/dev/full', 'w') as full:
        subprocess.run([sys.executable, 'script.py', '--size=3'], cwd=tmp_path, stderr=full)
    assert (tmp_path / 'ran').exists()

def test_a_run_whose_folder_was_renamed_goes_on_where_it_is(tmp_path):
    script = RESUMES.replace("out_dir = '.'", "out_dir = 'out'\noverwrite = False")
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'config.json').write_text(
        '{"size": 9, "out_dir": "old", "overwrite": true, "init_from": "scratch", "given": {}}')
    done = call(tmp_path, 'print(size, out_dir, overwrite, init_from)', '--init_from=resume', script=script)
    assert done.stdout == '9 out False resume\n'

@pytest.mark.skipif(os.name == 'nt', reason="Windows has no such pipes")
def test_a_reader_that_is_gone_ends_a_script_in_silence(tmp_path):
    body = "while True:\n    print('x' * 1000)\n"
    (tmp_path / 'script.py').write_text(f'import sys; sys.path.insert(0, {ROOT!r})' + SCRIPT + body)
    with subprocess.Popen([sys.executable, 'script.py'], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process: # as in `python sample.py | head`
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b'')

def test_a_script_outside_its_environment_says_what_to_type():
    bare = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-S', 'sample.py'], cwd=ROOT, env=bare, capture_output=True,
                          encoding='utf-8')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith("error: No module named 'torch'; activate its environment")

def test_a_config_typed_again_may_name_by_its_name_the_dataset_that_was_named_by_its_path(tmp_path):
    script = RESUMES.replace('init_from', "dataset = 'openwebtext'\ninit_from")
    (tmp_path / 'config.json').write_text('{"dataset": "data/novel", "given": {}}')
    (tmp_path / 'c.py').write_text("dataset = 'novel'")
    assert call(tmp_path, 'print(dataset)', 'c.py', '--init_from=resume', script=script).stdout == 'novel\n'

@pytest.mark.parametrize('option', ['eval_only', 'dry_run'])
def test_a_run_may_be_evaluated_on_the_dataset_of_a_config(tmp_path, option):
    script = RESUMES.replace('init_from', f"dataset = 'openwebtext'\n{option} = False\ninit_from")
    (tmp_path / 'config.json').write_text('{"dataset": "my novel", "given": {}}')
    (tmp_path / 'c.py').write_text("dataset = 'shakespeare'")
    for value, status in ((True, 0), (False, 2)):
        assert call(tmp_path, '', 'c.py', '--init_from=resume', f'--{option}={value}',
                    script=script).returncode == status
