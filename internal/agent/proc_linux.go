package agent

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// listening says whether any process in this network namespace listens on the port (proc(5), /proc/net/tcp: state 0A; a UDP socket that is
// bound to it listens).
func listening(protocol string, port uint16) bool {
	suffix, file := fmt.Sprintf(":%04X", port), "/proc/net/"+strings.ToLower(protocol)
	is := func(local, state string) bool {
		return strings.HasSuffix(local, suffix) && (protocol == "UDP" || state == "0A")
	}
	return hasSocket(file, is) || hasSocket(file+"6", is)
}

// onLoopback says whether a process in this network namespace has a UDP socket that datagrams to 127.0.0.1 reach.
func onLoopback(port uint16) bool {
	for file, hosts := range map[string][]string{
		"/proc/net/udp":  {"00000000", "0100007F"},
		"/proc/net/udp6": {strings.Repeat("0", 32)}, // a socket of both families
	} {
		for _, host := range hosts {
			if hasSocket(file, func(local, _ string) bool { return local == fmt.Sprintf("%s:%04X", host, port) }) {
				return true
			}
		}
	}
	return false
}

// hasSocket looks for a socket by its local address and state, both as the kernel writes them.
func hasSocket(file string, is func(local, state string) bool) bool {
	f, err := os.Open(file)
	if err != nil {
		return false // no IPv6, or no proc: nothing to wait for
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) > 3 && is(fields[1], fields[3]) {
			return true
		}
	}
	return false
}
