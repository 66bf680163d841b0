"""A worker whose comparison does what the answer says: the ways in which a real one goes wrong."""

import ctypes
import os
import resource
import signal
import sys
import time

from tto_jax.verifier import worker

_HELD = []


def equal(answer: str, reference: str) -> bool:
    act = ACTS.get(answer)
    return answer == reference if act is None else act(reference)


def spin_in_python(_):
    while True:
        try:
            while True:
                pass
        except BaseException:  # one that does not let itself be interrupted
            pass


def spin_in_c(_):
    # One bytecode that runs for hours: no Python signal handler would ever be called.
    return (3 ** (10**7)) ** (10**3) == 0


def wait(_):
    time.sleep(1000)


def stop(_):
    os.kill(os.getpid(), signal.SIGSTOP)


def segfault(_):
    ctypes.string_at(0)


def leave(_):
    os._exit(0)


def killed_from_outside(_):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_exit(_):
    sys.exit(0)


def raise_error(_):
    raise ValueError("what a parser says")


def big_block(_):
    return len(bytearray(4 * 2**30)) > 0


def big_list(_):
    held = []
    while True:
        held.append(bytearray(2**20))


def recurse(_):
    return recurse(_)


def recurse_in_c(_):
    nested = []
    for _ in range(10**6):
        nested = [nested]
    return repr(nested) == ""


def noise(_):
    print('{"equal": false, "retire": true}', flush=True)
    os.write(1, b'{"equal": false}\n' * 10**5)
    os.write(2, b"warning\n" * 10**5)
    return not os.read(0, 10)  # the requests are out of reach as well


def disarm(_):
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return True


def keep_some(_):
    _HELD.append(bytearray(600 * 2**20))
    return True


def write_file(path):
    with open(path, "wb") as file:
        file.write(b"x")


def spin_briefly(_):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    return True


def see_surroundings(_):
    limits = [resource.getrlimit(name) for name in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)]
    return os.getcwd() == os.sep and "TTO_SECRET" not in os.environ and limits == [(0, 0), (0, 0)]


def see_heavy_modules(answer_and_reference):
    """The real comparison first, for what it imports lazily."""
    answer, reference = answer_and_reference.split(";")
    from tto_jax.verifier import symbolic

    return symbolic.equal(answer, reference) and not {"jax", "jaxlib", "numpy", "torch"} & set(sys.modules)


ACTS = {name.replace("_", " "): act for name, act in list(globals().items()) if callable(act) and name != "equal"}


def load():
    print("a library that greets", flush=True)
    return equal


if __name__ == "__main__":
    worker.serve(load)
