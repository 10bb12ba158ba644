"""
Makes a dataset from the documentation that comes with Python, one token per character, without a network.

The paragraphs are from the language's documentation (pydoc_data.topics) and the docstrings of the standard
library, without those that are mostly code. Other versions of Python have a few more or fewer.
"""
# options
max_chars = 3_000_000 # maximum length of the text

import ast
import inspect
import os
import random
import re
import sys
import sysconfig

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(_folder, '..', '..')) # for the project's modules

from configurator import configure

configure(globals())

import pydoc_data.topics

from tqdm import tqdm

from publish import write_dataset
from tokenizer import CharTokenizer

def library_files():
    """ the standard library's modules, in the order of their names """
    skip = {'test', 'tests', 'idlelib', 'lib2to3', 'turtledemo', 'site-packages', 'dist-packages',
            'pydoc_data'}
    for place, folders, files in os.walk(sysconfig.get_path('stdlib')):
        folders[:] = sorted(set(folders) - skip)
        yield from (os.path.join(place, file) for file in sorted(files) if file.endswith('.py'))

def docstrings(path):
    """ the docstrings of a module, its classes and its functions, from the source alone """
    with open(path, 'rb') as file:
        tree = ast.parse(file.read())
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or '' for node in ast.walk(tree) if isinstance(node, places)]

def prose(text):
    """ the paragraphs of more than a few words that are nearly all letters and spaces """
    for paragraph in re.split(r'\n\s*\n', text):
        paragraph = inspect.cleandoc(paragraph)
        letters = sum(char.isalpha() or char in ' \n' for char in paragraph)
        if len(paragraph) > 40 and letters > 0.92 * len(paragraph) and paragraph.isascii():
            yield paragraph

texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
for path in tqdm(list(library_files()), desc='reading docstrings', unit='file', delay=1):
    texts += docstrings(path)
paragraphs = list(dict.fromkeys(paragraph for text in texts for paragraph in prose(text))) # no duplicates
random.Random(0).shuffle(paragraphs) # the same order every time, and all kinds in both splits
text = re.sub(r'[^\n -~]', '', '\n\n'.join(paragraphs))[:max_chars]
write_dataset(_folder, text, CharTokenizer(sorted(set(text))))
