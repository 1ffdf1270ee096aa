"""A model as noesis sees it: layers, blocks, routers, denoisers, and which tensor an output means."""
