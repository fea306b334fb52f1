"""The scores of a fold's cases: calculated beside the network, and kept as soon as they are known.

`Scorers` scores in processes of their own, while the network segments the next case; predict.py
reads and writes the scans of a cohort in such processes. `Kept` writes the record of each case into
a file, so that an evaluation that was cut off goes on at its case.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil

import checkpoint
import data
import scans
from config import UserError

# What a record says: counts up when the same segmentation would get another one.
FORMAT = 1


# ------------------------------------------------------------------------- beside the network
def cannot_evaluate(name, error):
    """What a case without a score comes to."""
    raise UserError(f"cannot evaluate {name}: {error}")


class Scorers:
    """Calls a function for one case after the other, each in a process of its own.

    So nothing waits between two cases, a process that dies is known by its case, and one whose
    parent was killed ends by itself."""

    def __init__(self, most, done, failed=cannot_evaluate):
        """most: processes at a time; with 0, this process calls the function itself.
        done(name, result): called in this process with each result, in any order.
        failed(name, error): the same for a case without a result; by default raises UserError."""
        self.most = most
        self.done = done
        self.failed = failed
        self.running = {}  # the end of a pipe where a result will arrive: (case name, process)

    def begin(self, name, function, *arguments):
        """Call function(*arguments) for the case `name`. Waits while there is no free place.

        Whatever `failed` raises, by default UserError, may be of this case or of another that began
        before it."""
        if self.most == 0:
            answer = call(function, arguments)
            return self.take(name, *answer)

        self.wait(self.most - 1)

        # A fork: the arrays are not copied. CUDA is not used in the process, and torch at most on
        # the CPU (segment_cohort.read), which sets one thread first. So torch starts no threads,
        # and waits for none of its parent's, which a fork does not have.
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        ends = [receiver, *self.running]
        process = context.Process(target=work, args=(sender, ends, function, arguments))
        process.start()

        # The process has the only sender left: if it dies, the pipe ends.
        sender.close()
        self.running[receiver] = name, process
        self.wait(self.most)

    def wait(self, most=0):
        """Take what is there, and wait until at most `most` processes run. Raises as `begin`."""
        while self.running:
            # Without a timeout, this waits for the first of them.
            timeout = 0 if len(self.running) <= most else None
            ready = multiprocessing.connection.wait(self.running, timeout)
            if not ready:
                return

            # Results are taken one by one: the first that is none ends the run.
            for receiver in ready:
                name, process = self.running.pop(receiver)
                answer = answer_of(process, receiver)
                self.take(name, *answer)

    def leave(self):
        """Wait for none of them: what they have to say goes nowhere, and they end."""
        for receiver in self.running:
            receiver.close()
        self.running.clear()

    def take(self, name, result, error):
        if error:
            self.failed(name, error)
        else:
            self.done(name, result)


def answer_of(process, receiver):
    """What a process that is done has sent: as of `call`."""
    try:
        answer = receiver.recv()
    except EOFError:
        # It has sent nothing, so it was killed.
        answer = None

    receiver.close()
    process.join()
    if answer is None:
        return None, (f"its process died with exit code {process.exitcode}; was there too little "
                      "memory?")
    return answer


def work(sender, ends, function, arguments):
    """What a process does for its case. ends: where its parent receives."""
    # The parent alone may have these: when it is gone, nobody waits for a large result to be taken.
    for receiver in ends:
        receiver.close()

    # Ctrl-C and Slurm signal all processes of a job: what was begun is finished.
    data.ignore_signals()
    answer = call(function, arguments)
    try:
        sender.send(answer)
    except BrokenPipeError:
        pass  # nobody waits for it any more


def call(function, arguments):
    """-> (result, ""), or (None, what is wrong with the files of the case)."""
    try:
        return function(*arguments), ""
    except (UserError, *scans.READ_ERRORS) as error:
        return None, str(error)


# ------------------------------------------------------------------------------- kept on the disk
class Kept:
    """The records of a fold's cases, each in a file of its own until the fold has its dice.json.

    A record is good for what it was made of: network, settings, scan, label and task."""

    def __init__(self, folder, made_by):
        """folder: of the fold. made_by: what the segmentations were made by, to be written as
        JSON; None: nothing is read and written."""
        self.folder = os.path.join(folder, "scores")
        self.made_by = made_by

    def path(self, name):
        # Names of cases are those of files, whatever is in them.
        safe = re.sub(r"[^\w.-]", "_", name)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return os.path.join(self.folder, f"{safe[:80]}-{digest[:8]}.json")

    def read(self, name, made_of):
        """The record of a case, or None if there is none that was made of the same."""
        if self.made_by is None or not os.path.exists(self.path(name)):
            return None
        try:
            known = json.loads(checkpoint.read_text(self.path(name)))
        except ValueError:
            return None  # damaged: it is made again
        same = known["made_of"] == self.describe(made_of)
        return known["record"] if same else None

    def write(self, name, made_of, record):
        if self.made_by is not None:
            known = {"made_of": self.describe(made_of), "record": record}
            checkpoint.write_text(self.path(name), json.dumps(known))

    def describe(self, made_of):
        """All that a record depends on, as it reads when it comes back from a file."""
        return json.loads(json.dumps([FORMAT, self.made_by, made_of]))

    def remove(self):
        """Delete all of them: the records stand elsewhere now. Processes may do so together."""
        shutil.rmtree(self.folder, ignore_errors=True)
