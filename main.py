"""``python main.py {fit,validate,test,predict,generate,export,replay} --config ...``; ``--help`` explains each."""

import gc

if __name__ == "__main__":
    gc.disable()  # looking for garbage among freshly imported libraries takes a third of the time to start
    from moslim.cli import main

    gc.freeze()
    gc.enable()
    main()
