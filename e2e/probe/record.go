package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// record prints what comes to each address, as lines of quoted text, and answers nothing: "tcp 1 "GET ..."", "tcp 1 EOF", "udp "..."".
func record(addrs []string) error {
	failed := make(chan error)
	var mu sync.Mutex
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf(format+"\n", args...)
	}
	conns := 0
	for _, a := range addrs {
		network, addr, _ := strings.Cut(a, "://")
		if network == "udp" {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			go func() {
				for b := make([]byte, 64<<10); ; {
					n, _, err := c.ReadFrom(b)
					if err != nil {
						failed <- err
						return
					}
					say("udp %q", b[:n])
				}
			}()
			continue
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				mu.Lock()
				conns++
				id := conns
				mu.Unlock()
				go func() {
					defer c.Close()
					for b := make([]byte, 64<<10); ; {
						n, err := c.Read(b)
						if n > 0 {
							say("tcp %d %q", id, b[:n])
						}
						if errors.Is(err, io.EOF) {
							say("tcp %d EOF", id)
							return
						}
						if err != nil {
							say("tcp %d %v", id, err)
							return
						}
					}
				}()
			}
		}()
	}
	return <-failed
}
