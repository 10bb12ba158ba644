"""
A text that every Python carries: the language's documentation and the standard library's docstrings.

A token a character, from no network. The amount differs a little from one version of Python to another.
"""
import ast
import os
import random
import sys
import sysconfig

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(folder, '..', '..')) # for the project's modules

from configurator import configure

# options
max_chars = 3_000_000 # the text ends here

configure(globals())

import pydoc_data.topics

from dataset import write_dataset
from tokenizer import CharTokenizer

def docstrings(path):
    """ the docstrings of a module, its classes and its functions, from the source alone """
    with open(path, 'rb') as file:
        tree = ast.parse(file.read())
    places = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return [doc for doc in map(ast.get_docstring, places) if doc and len(doc) > 200]

texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
library = sysconfig.get_path('stdlib')
for name in sorted(os.listdir(library)):
    if name.endswith('.py'):
        texts += docstrings(os.path.join(library, name))
random.Random(0).shuffle(texts) # the same order every time, and prose of all kinds in both splits
text = '\n\n'.join(text.strip() for text in texts)[:max_chars]
text = ''.join(char for char in text if char == '\n' or ' ' <= char <= '~') # a small vocabulary
write_dataset(folder, [text], CharTokenizer(sorted(set(text))))
