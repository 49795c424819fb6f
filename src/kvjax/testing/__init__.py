"""The contract suite: what every cache method must hold, run over the package's own methods and over yours.

    python -m kvjax.testing --plugins=my_module                  the examples of the methods that it registers
    python -m kvjax.testing --plugins=my_module --cache=NAME     one plan name

It needs pytest (`pip install 'kvjax[test]'`); what follows the two options is passed on to it.
"""
