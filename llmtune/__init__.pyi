from llmtune.launch.python_api import load_run as load_run
from llmtune.launch.python_api import run as run

__version__: str
