"""`make chaos`: Belfry's processes and servers under a steady load, killed again and again, and then an audit.

Nothing of Belfry imports this package, and production needs none of it.
"""
