"""
Jobs of torchrun that can be watched, killed in part and ended without a trace.
"""
import os
import re
import signal
import socket
import subprocess
import sys
import time

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run')

def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]

class Job:
    """ an agent of torchrun in a session of its own, with what it and its workers print in a file """

    def __init__(self, options, command, cwd, printed):
        self.printed = str(printed)
        with open(self.printed, 'w') as file:
            self.agent = subprocess.Popen([*TORCHRUN, *options, *command], cwd=cwd, stdout=file, stderr=file,
                                          stdin=subprocess.DEVNULL, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def text(self):
        with open(self.printed, encoding='utf-8', errors='replace') as file:
            return file.read()

    def workers(self):
        """ the processes that the agent started, by their rank there """
        with open(f'/proc/{self.agent.pid}/task/{self.agent.pid}/children') as file:
            return [int(pid) for pid in file.read().split()]

    def wait_for(self, pattern, count=1, timeout=60):
        """ what the pattern found the count-th time in what was printed; raises where it does not come """
        end = time.time() + timeout
        while time.time() < end:
            found = list(re.finditer(pattern, self.text(), re.MULTILINE))
            if len(found) >= count:
                return found[count - 1]
            if self.agent.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} ({count} times) from a job that "
                             f"{'runs' if self.agent.poll() is None else 'has ended'}:\n{self.text()}")

    def ended(self, timeout=60):
        """ the exit status """
        try:
            return self.agent.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end:\n{self.text()}") from None

    def kill(self):
        """ the agent and its workers by SIGKILL, all that is left of them """
        if self.agent.poll() is not None:
            return
        self.agent.send_signal(signal.SIGSTOP) # so that it starts no more
        for pid in [*self.workers(), self.agent.pid]:
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()
