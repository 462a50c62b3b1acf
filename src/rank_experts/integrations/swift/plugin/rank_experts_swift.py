"""What `swift … --external_plugins` names. ms-swift runs this file by its path, under a name of its own making.

So it defines nothing: what is registered lies in the package, where it exists once, and can be pickled.
"""

from rank_experts.integrations.swift import register

register()
