package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// checks are what an application may rely on, by name. Each gets the server's address.
var checks = map[string]func(addr string) error{
	"tcp echo":                    checkEcho,
	"tcp refused":                 checkRefused,
	"tcp timeout":                 checkTimeout,
	"tcp half-close by client":    checkHalfCloseClient,
	"tcp half-close by server":    checkHalfCloseServer,
	"tcp reset by server":         checkReset,
	"tcp reset amid data":         checkCutOff,
	"tcp close with data, server": checkRudeServer,
	"tcp close with data, client": checkRudeClient,
	"tcp keepalive":               checkKeepAlive,
	"udp sizes":                   checkUDPSizes,
	"udp refused":                 checkUDPRefused,
	"udp many conversations":      checkUDPMany,
}

// check runs all checks and tells of each that fails.
func check(addr string) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := 0
	for name, fn := range checks {
		wg.Go(func() {
			began := time.Now()
			err := fn(addr)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed++
				fmt.Printf("FAIL %s (%v): %v\n", name, time.Since(began).Round(time.Millisecond), err)
				return
			}
			fmt.Printf("ok %s (%v)\n", name, time.Since(began).Round(time.Millisecond))
		})
	}
	wg.Wait()
	if failed > 0 {
		return fmt.Errorf("%d of %d checks failed", failed, len(checks))
	}
	return nil
}

func dial(addr string, port int) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, strconv.Itoa(port)), echoTimeout)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), c.SetDeadline(time.Now().Add(2 * echoTimeout))
}

func checkEcho(addr string) error {
	c, err := dial(addr, portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	go func() {
		_, _ = c.Write(want)
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("%d of %d bytes came back, %w", len(got), len(want), err)
	}
	return nil
}

func wantErrno(err error, want syscall.Errno) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("got %q, want %w", fmt.Sprint(err), want)
	}
	return nil
}

func checkRefused(addr string) error {
	c, err := dial(addr, portClosed)
	if err == nil {
		_ = c.Close()
	}
	return wantErrno(err, syscall.ECONNREFUSED)
}

// checkTimeout waits a few seconds for what would take two minutes.
func checkTimeout(addr string) error {
	if got := dialResult(net.JoinHostPort(addr, strconv.Itoa(portFull))); got != "timeout" {
		return fmt.Errorf("got %s, want timeout", got)
	}
	return nil
}

func checkHalfCloseClient(addr string) error {
	c, err := dial(addr, portCount)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, 300_000)); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "300000 <nil>" {
		return fmt.Errorf("got %q, %w", b, err)
	}
	return nil
}

func checkHalfCloseServer(addr string) error {
	c, err := dial(addr, portHalf)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("got %q, want the server's end", fmt.Sprint(err))
	}
	for range 3 {
		if _, err := c.Write(make([]byte, 100_000)); err != nil {
			return err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return wantLast(addr, func(l last) bool { return l.Half == 300_000 })
}

// wantLast asks the server what arrived, until it is right.
func wantLast(addr string, ok func(last) bool) error {
	var l last
	for end := time.Now().Add(echoTimeout); time.Now().Before(end); {
		c, err := dial(addr, portLast)
		if err != nil {
			return err
		}
		err = json.NewDecoder(c).Decode(&l)
		_ = c.Close()
		if err != nil {
			return err
		}
		if ok(l) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("the server got %+v", l)
}

func checkReset(addr string) error {
	c, err := dial(addr, portReset)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return wantErrno(err, syscall.ECONNRESET)
}

func checkCutOff(addr string) error {
	c, err := dial(addr, portCutOff)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 10<<10)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, c)
	return wantErrno(err, syscall.ECONNRESET)
}

func checkRudeServer(addr string) error {
	c, err := dial(addr, portRude)
	if err != nil {
		return err
	}
	defer c.Close()
	if n, err := io.Copy(io.Discard, c); n != rudeBytes || err != nil {
		return fmt.Errorf("%d of %d bytes came, %w", n, rudeBytes, err)
	}
	return nil
}

func checkRudeClient(addr string) error {
	c, err := dial(addr, portSink)
	if err != nil {
		return err
	}
	_, err = c.Write(make([]byte, rudeBytes))
	if err := errors.Join(err, c.Close()); err != nil {
		return err
	}
	return wantLast(addr, func(l last) bool { return l.Sink == rudeBytes })
}

// checkKeepAlive says nothing while the kernel asks every second whether the peer lives: without an answer to two questions it would end the
// connection (tcp(7), TCP_KEEPCNT).
func checkKeepAlive(addr string) error {
	c, err := dial(addr, portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(4500 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the idle connection ended: %w", err)
	}
	_ = c.SetReadDeadline(time.Now().Add(echoTimeout))
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func udp(addr string, port int) (net.Conn, error) {
	return net.Dial("udp", net.JoinHostPort(addr, strconv.Itoa(port)))
}

// checkUDPSizes sends datagrams up to what an IP packet holds (65,535 bytes less the headers). Any may be lost, so each gets three tries.
func checkUDPSizes(addr string) error {
	c, err := udp(addr, portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	got := make([]byte, 64<<10)
	for _, size := range []int{0, 1, 512, 1232, 1472, 1473, 4096, 9000, 65507} {
		want := bytes.Repeat([]byte{byte(size)}, size)
		var failed error
		for range 3 {
			if _, err := c.Write(want); err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
			_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
			n, err := c.Read(got)
			failed = err
			if err == nil && !bytes.Equal(got[:n], want) {
				failed = fmt.Errorf("%d other bytes came back", n)
			}
			if failed == nil {
				break
			}
		}
		if failed != nil {
			return fmt.Errorf("%d bytes: %w", size, failed)
		}
	}
	return nil
}

// checkUDPRefused does it three times: each is a conversation that ended.
func checkUDPRefused(addr string) error {
	c, err := udp(addr, portClosed)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 3 {
		if _, err := c.Write([]byte("anybody?")); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(echoTimeout))
		_, err = c.Read(make([]byte, 1))
		if err := wantErrno(err, syscall.ECONNREFUSED); err != nil {
			return err
		}
	}
	return nil
}

func checkUDPMany(addr string) error {
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	for i := range cap(errs) {
		wg.Go(func() { errs <- udpOnce(addr, fmt.Sprint("conversation ", i)) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func udpOnce(addr, text string) error {
	c, err := udp(addr, portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 100)
	for range 3 {
		if _, err = c.Write([]byte(text)); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
		var n int
		if n, err = c.Read(b); err == nil && string(b[:n]) != text {
			return fmt.Errorf("sent %q, got %q", text, b[:n])
		}
		if err == nil {
			return nil
		}
	}
	return err
}

// dialResult is how connect(2) ends, in one word.
func dialResult(hostport string) string {
	c, err := net.DialTimeout("tcp", hostport, 3*time.Second)
	switch {
	case err == nil:
		_ = c.Close()
		return "connected"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, os.ErrDeadlineExceeded), strings.Contains(err.Error(), "timeout"):
		return "timeout"
	}
	return err.Error()
}
