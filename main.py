"""``python main.py {fit,validate,test,predict,generate,export} --config ...``; ``--help`` explains each."""

from moslim.cli import main

if __name__ == "__main__":
    main()
