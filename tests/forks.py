"""
A process that has imported torch once and runs scripts in forks of itself, each in a second where a Python of
its own takes three; it reads a line of JSON for each and answers with one. A job of several processes gets
the environment that torchrun gives.
"""
import gc
import io
import json
import os
import runpy
import signal
import socket
import sys
import threading # so that a fork does not import it first, with the lock that it takes

def become(job):
    """ the script of a job, in this process """
    os.chdir(job['cwd'])
    sys.dont_write_bytecode = False # a copy's modules are compiled once, though the project's own may not be
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(n, 'w', encoding='utf-8', closefd=False) for n in (1, 2))
    sys.stderr.reconfigure(line_buffering=True)
    if job['stdout'] == job['stderr']: # as by python -u
        sys.stdout = io.TextIOWrapper(open(1, 'wb', 0, closefd=False), encoding='utf-8', write_through=True)
    sys.argv, sys.path[0] = [job['script'], *job['args']], os.path.dirname(os.path.abspath(job['script']))
    try:
        runpy.run_path(job['script'], run_name='__main__')
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        except SystemExit as leaving:
            status = leaving.code
    threading._shutdown() # what waits for a Python's end
    import atexit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def torchrun_s(n):
    """ what torchrun tells each of n processes """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n),
             'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)} for rank in range(n)]

def with_transformers():
    """ a server with what takes two more seconds, and would make all other forks slower """
    ours, its = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        from transformers import (AutoConfig, GPT2LMHeadModel, GPT2TokenizerFast, # noqa
                                  PreTrainedTokenizerFast)
        with its.makefile('rw', encoding='utf-8') as lines:
            serve(lines, lines)
        os._exit(0)
    its.close()
    return ours.makefile('rw', encoding='utf-8')

def serve(jobs, answers):
    other = None
    gc.collect()
    gc.freeze() # else a fork that collects garbage copies all of this
    for line in jobs:
        job = json.loads(line)
        how = status_so_far if 'pid' in job else start if job['stdout'] == job['stderr'] else status_of
        if job.get('transformers'):
            other = other or with_transformers()
            other.write(json.dumps({**job, 'transformers': False}) + '\n')
            other.flush()
            answers.write(other.readline() or '{}\n') # nothing if it has ended
        else:
            answers.write(json.dumps({'status': how(job)}) + '\n')
        answers.flush()

def start(job):
    """ begin a job that is told to end by signals: its process """
    pid = os.fork()
    if pid == 0:
        become(job)
    return pid

def status_so_far(job):
    """ of what was started; None while it runs """
    ended, status = os.waitpid(job['pid'], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None

def status_of(job):
    """ run a job in forks, and wait for them """
    for name in ('stdout', 'stderr'):
        open(job[name], 'w').close()
    children, n = [], job['processes']
    for environment in torchrun_s(n) if n > 1 else [{}]:
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(environment)
            become(job)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(child, signal.SIGKILL) for child in children])
    signal.alarm(job['timeout'])
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    signal.alarm(0)
    return next(filter(None, statuses), 0)

if __name__ == '__main__':
    # what the scripts import, and take longest at
    import matplotlib.pyplot, numpy.random, psutil, torch._dynamo, tqdm # noqa
    import matplotlib.backends.backend_agg, PIL.features, torch.utils.serialization.config # noqa
    serve(sys.stdin, sys.stdout)
