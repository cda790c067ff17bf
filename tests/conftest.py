"""What every test has: garbage is looked for seldom.

Libraries hold a million objects, and looking at all of them again and again takes a sixteenth of the time.
"""

from __future__ import annotations

import gc

gc.set_threshold(50_000, 20, 50)
