package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// serveName says its name to whoever connects, and to every datagram, at each address; an address may name variables of the environment.
func serveName(name string, addrs []string) error {
	failed := make(chan error)
	for _, a := range addrs {
		network, addr, ok := strings.Cut(os.ExpandEnv(a), "://")
		if !ok {
			return fmt.Errorf("address %q: want tcp://HOST:PORT or udp://HOST:PORT", a)
		}
		if network == "udp" {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			go func() {
				for b := make([]byte, 1024); ; {
					_, from, err := c.ReadFrom(b)
					if err != nil {
						failed <- err
						return
					}
					_, _ = c.WriteTo([]byte(name), from)
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
				_, _ = io.WriteString(c, name)
				_ = c.Close()
			}
		}()
	}
	return <-failed
}

// who asks for the name: over UDP twice a second, as a client does that gets no answer.
func who(network, addr string) (string, error) {
	c, err := net.DialTimeout(network, addr, 3*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b := make([]byte, 1024)
	for range 6 {
		if network == "udp" {
			_, _ = io.WriteString(c, "?")
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := c.Read(b)
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return string(b[:n]), err
		}
	}
	return "", errors.New("no answer")
}
