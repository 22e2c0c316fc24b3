"""The one door to what third parties keep private: nowhere else in the package does such a name stand.

Everything here is an alias or a function of one line. ``tests/_compat/test_private_names.py`` checks in one named test
for each that it is still there, with the signature that is relied on. Names are as they are here since the oldest
version that ``pyproject.toml`` allows, unless a comment says otherwise.
"""
