// Command probe is both ends of the end-to-end tests of the data path: a server for a pod, and the checks that are run against it.
package main

import (
	"fmt"
	"os"
	"strconv"
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 1 && args[0] == "serve":
		err = serve()
	case len(args) == 2 && args[0] == "check": // ADDRESS: every check, side by side
		err = check(args[1])
	case len(args) == 2 && args[0] == "dial": // HOST:PORT: one word on how connect(2) ends
		fmt.Println(dialResult(args[1]))
	case len(args) == 3 && args[0] == "hold": // HOST:PORT COUNT: that many connections at once, until standard input ends
		var n int
		if n, err = strconv.Atoi(args[2]); err == nil {
			err = hold(args[1], n)
		}
	case len(args) >= 3 && args[0] == "name": // NAME ADDRESS...: a server that says its name
		err = serveName(args[1], args[2:])
	case len(args) == 3 && args[0] == "who": // NETWORK HOST:PORT: asks one
		var name string
		if name, err = who(args[1], args[2]); err == nil {
			fmt.Println(name)
		}
	case len(args) == 4 && args[0] == "web": // NAME ADDRESS ADDRESS: an HTTP server, and one of gRPC
		err = serveWeb(args[1], args[2], args[3])
	case len(args) >= 3 && args[0] == "front": // ADDRESS URL HEADER...: an HTTP server that asks another one, and passes on these headers alone
		err = serveFront(args[1], args[2], args[3:])
	case len(args) >= 2 && args[0] == "record": // ADDRESS...: prints what comes
		err = record(args[1:])
	case len(args) == 4 && args[0] == "tls": // NAME ADDRESS DIR: an HTTPS server with tls.crt and tls.key of a directory
		err = serveTLS(args[1], args[2], args[3])
	default:
		err = fmt.Errorf("usage: probe serve | check ADDRESS | dial HOST:PORT | hold HOST:PORT COUNT | name NAME ADDRESS... | who NETWORK HOST:PORT | web NAME ADDRESS ADDRESS | front ADDRESS URL HEADER... | record ADDRESS... | tls NAME ADDRESS DIR")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}
