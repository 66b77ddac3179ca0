"""Jobs of cryo_svae for the CCP-EM Pipeliner: forms over the command ``cryo-svae``, and its results shown.

Imports the Pipeliner and the standard library alone; cryo_svae may live in another environment, as long as
``cryo-svae`` is on the PATH. Written for ccpem-pipeliner 1.6.
"""
