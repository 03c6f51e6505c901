package agent

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// listening says whether any process in this network namespace listens on the TCP port (proc(5), /proc/net/tcp: state 0A).
func listening(port uint16) bool {
	suffix := fmt.Sprintf(":%04X", port)
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		if listensIn(file, suffix) {
			return true
		}
	}
	return false
}

func listensIn(file, suffix string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false // no IPv6, or no proc: nothing to wait for
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) > 3 && strings.HasSuffix(fields[1], suffix) && fields[3] == "0A" {
			return true
		}
	}
	return false
}
