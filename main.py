"""``python main.py {fit,validate,test,predict,generate,export,replay} --config ...``; ``--help`` explains each."""

import gc

if __name__ == "__main__":
    gc.disable()  # garbage collection takes a third of the time of the imports
    from moslim.cli import main

    gc.freeze()
    gc.enable()
    main()
