"""
The documentation, against the code it speaks of.
"""
import glob
import os
import re
import subprocess
import sys

import pytest

from configurator import ROOT, read_options

SCRIPTS = [os.path.relpath(path, ROOT) for pattern in ('*.py', 'data/*/prepare.py')
           for path in sorted(glob.glob(os.path.join(ROOT, pattern)))
           if re.search(r'from configurator import .*\bconfigure\b', open(path, encoding='utf-8').read())]

def test_the_reference_is_what_the_scripts_say():
    printed = subprocess.run([sys.executable, os.path.join(ROOT, 'configurator.py')], capture_output=True,
                             encoding='utf-8', check=True).stdout
    with open(os.path.join(ROOT, 'docs', 'configuration-reference.md'), encoding='utf-8') as file:
        assert file.read() == printed, "python configurator.py > docs/configuration-reference.md mends it"
    assert all(f'## {script}\n' in printed for script in SCRIPTS)

@pytest.mark.parametrize('script', SCRIPTS)
def test_every_option_says_what_it_means(script):
    options = read_options(os.path.join(ROOT, script))[1]
    assert options and [name for _, name, _, comment in options if not comment] == []

@pytest.mark.parametrize('page', [
    'README.md', *(f'docs/{name}' for name in os.listdir(os.path.join(ROOT, 'docs'))
                   if name.endswith('.md')), 'config/finetune/README.md'])
def test_every_link_and_every_option_in_a_page_exists(page):
    with open(os.path.join(ROOT, page), encoding='utf-8') as file:
        text = file.read()
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', text):
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), target
    options = {'nproc_per_node', 'nnodes'} # torchrun's
    known = options | {name for script in SCRIPTS
                       for _, name, _, _ in read_options(os.path.join(ROOT, script))[1]}
    lines = [line for line in text.replace('\\\n', ' ').splitlines()
             if re.search(r'\b(train|sample|export|evaluate|bench|prepare)\.py', line)]
    for line in lines:
        for command in re.findall(r'\w+\.py[^`|;]*', line):
            for option in re.findall(r' --(\w+)=', command):
                assert option in known, (page, option)
    for path in re.findall(r'\b(?:config|data|docs|tests)/[\w/]+\.(?:py|md|png)\b', text):
        folder = path.split('/')[1]
        assert folder == 'NAME' or os.path.exists(os.path.join(ROOT, path)), path

def test_the_troubleshooting_is_headed_by_messages_that_the_code_has():
    with open(os.path.join(ROOT, 'docs', 'finetuning-quickstart.md'), encoding='utf-8') as file:
        headings = re.findall(r'^\*\*`(.+?)`\*\*:', file.read(), re.MULTILINE)
    code = ''.join(open(path, encoding='utf-8').read() for path in glob.glob(os.path.join(ROOT, '*.py')))
    code = re.sub(r'"\s*\n\s*f?"', '', code) # texts over several lines, joined
    assert len(headings) > 8
    for heading in headings:
        for part in heading.removeprefix('error: ').removeprefix('warning: ').split('…'):
            assert part.strip() in code, (heading, part)

def test_the_plans_in_memory_md_are_those_of_a_dry_run(run):
    with open(os.path.join(ROOT, 'docs', 'memory.md'), encoding='utf-8') as file:
        command, block = re.findall(r'```\n(.*?)```', file.read(), re.DOTALL)[:2]
    out = run(*command.split()[1:]).out.strip()
    here = '; more RAM than is free here' # or not
    assert block.strip().replace(here, '') == out.replace(here, '')

@pytest.mark.parametrize('page', ['README.md', *glob.glob('docs/*.md', root_dir=ROOT)])
def test_a_command_has_no_comment_after_it_since_zsh_and_windows_would_pass_it_on(page):
    with open(os.path.join(ROOT, page), encoding='utf-8') as file:
        blocks = re.findall(r'^```\n(.*?)^```', file.read(), re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()
                if re.match(r'(\w+=\S+ )*(python|make|pip|torchrun|kill|\.) ', line)]
    assert [line for line in commands if re.search(r'\s#', line)] == []
