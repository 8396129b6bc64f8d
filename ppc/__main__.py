"The command `ppc`, also as `python -m ppc`."
import os

# A thread of OpenMP waits for the others in a loop, by default for milliseconds. Beside another
# busy process that loop takes the core that the others need: on two cores training was 35 times
# slower. A short loop costs a tenth on a quiet machine. Read when torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from ppc.cli import app  # noqa: E402

if __name__ == '__main__':
    app()
