"""Print the commands of a section of README.md as they stand there: the lines of its first ``bash`` block.

python .ci/readme.py "## Install"
"""

import re
import sys
from pathlib import Path

text = (Path(__file__).parents[1] / "README.md").read_text()
heading = sys.argv[1]
_, found, rest = text.partition(f"\n{heading}\n")
if not found:
    sys.exit(f"README.md has no heading {heading!r}.")
section = re.split(rf"\n#{{2,{heading.count('#')}}} ", rest)[0]
blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
if not blocks:
    sys.exit(f"README.md has no commands under {heading!r}.")
print(blocks[0], end="")
