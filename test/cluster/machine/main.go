// Command machine makes and enters the machines of a test cluster. It is not
// for use by hand: package cluster runs it.
//
//	machine boot DIR        make the machine in DIR; file 3 is its listening socket, if any
//	machine init DIR        the first process of the machine; started by boot
//	machine enter PID START PROGRAM ARG...   run a program in the machine whose first process is PID
//	machine become PROGRAM ARG...            the last step of enter, inside
//	machine netns PID PROGRAM ARG...         run a program in a network namespace only
package main

import (
	"errors"
	"fmt"
	"os"
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		code = 1
	}
	os.Exit(code)
}

func run(args []string) (code int, err error) {
	switch {
	case len(args) == 2 && args[0] == "boot":
		return 0, boot(args[1])
	case len(args) == 2 && args[0] == "init":
		return 0, initMain(args[1])
	case len(args) >= 4 && args[0] == "enter":
		return enter(args[1], args[2], args[3:])
	case len(args) >= 2 && args[0] == "become":
		return 0, become(args[1:])
	case len(args) >= 3 && args[0] == "netns":
		return 0, enterNet(args[1], args[2:])
	}
	return 0, errors.New("usage: see the package's comment")
}
