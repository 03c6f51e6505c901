package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// workers is how many connections are made side by side.
const workers = 64

// hold opens n connections to an echo port, uses each of them, tells how long that took, and keeps them until standard input ends; then it
// uses each of them again.
func hold(hostport string, n int) error {
	limit := syscall.Rlimit{Cur: uint64(n) + 100, Max: uint64(n) + 100}
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err != nil {
		return err
	}
	if limit.Max = max(limit.Max, have.Max); have.Cur < limit.Cur {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return fmt.Errorf("open files: %w", err)
		}
	}
	conns := make([]net.Conn, n)
	began := time.Now()
	var made atomic.Int64
	err := each(n, func(i int) error {
		c, err := net.DialTimeout("tcp", hostport, time.Minute)
		if err != nil {
			return err
		}
		conns[i] = c
		if made.Add(1) == 1000 {
			fmt.Printf("1000 in %v\n", time.Since(began).Round(time.Millisecond))
		}
		return use(c, i)
	})
	if err != nil {
		return err
	}
	fmt.Printf("open %d in %v\n", n, time.Since(began).Round(time.Millisecond))
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := each(n, func(i int) error { return use(conns[i], i) }); err != nil {
		return fmt.Errorf("after a while: %w", err)
	}
	fmt.Println("all there")
	for _, c := range conns {
		_ = c.Close()
	}
	return nil
}

func use(c net.Conn, i int) error {
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	want := fmt.Sprintf("%08d", i)
	got := make([]byte, len(want))
	if _, err := io.WriteString(c, want); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("sent %s, got %s", want, got)
	}
	return nil
}

// each calls fn for 0 to n-1, several at a time, and returns the first error with how many there were.
func each(n int, fn func(i int) error) error {
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := fn(i); err != nil {
					failed.Add(1)
					once.Do(func() { first = fmt.Errorf("connection %d: %w", i, err) })
				}
			}
		})
	}
	wg.Wait()
	if first != nil {
		return errors.Join(fmt.Errorf("%d of %d failed", failed.Load(), n), first)
	}
	return nil
}
