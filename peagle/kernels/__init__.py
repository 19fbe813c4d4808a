"""Everything that depends on hardware, behind one object: ``choose.backend_for(device)``.

``reference`` is plain PyTorch and runs anywhere. ``cpu`` and ``cuda`` override what they do faster.
"""
