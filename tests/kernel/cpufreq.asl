// Six clocks in two domains (or one, with -DSHARED), their registers kept by pc-testdev.
DefinitionBlock ("", "SSDT", 2, "DYNLIB", "CPUFREQ", 1) {
  External (\_SB.CPUS, DeviceObj)
  External (\_SB.CPUS.C000, ProcessorObj)
  External (\_SB.CPUS.C001, ProcessorObj)
  Scope (\_SB) {
    OperationRegion (TDEV, SystemIO, 0xE0, 4)               // the 4 bytes pc-testdev stores
    Field (TDEV, ByteAcc, NoLock, Preserve) { PST0, 8, PST1, 8, TOFF, 8, PPCV, 8 }
    Name (PLST, 0)                                          // _PPC last told to the OS
    Name (PSSX, Package (6) {                               // MHz, mW, latency us, latency us, control, status
      Package (6) { 2400, 35000, 10, 10, 0, 0 }, Package (6) { 2000, 28000, 10, 10, 1, 1 },
      Package (6) { 1600, 21000, 10, 10, 2, 2 }, Package (6) { 1200, 15000, 10, 10, 3, 3 },
      Package (6) { 1000, 12000, 10, 10, 4, 4 }, Package (6) {  800,  9000, 10, 10, 5, 5 } })
  }
  Scope (\_SB.CPUS.C000) {
    Name (_PCT, Package (2) { ResourceTemplate () { Register (SystemIO, 8, 0, 0xE0) },
                              ResourceTemplate () { Register (SystemIO, 8, 0, 0xE0) } })
    Method (_PSS) { Return (\_SB.PSSX) }
    Method (_PPC) { Return (\_SB.PPCV) }
#ifdef SHARED
    Name (_PSD, Package (1) { Package (5) { 5, 0, 0, 0xFC, 2 } })   // SW_ALL, one domain of 2
#else
    Name (_PSD, Package (1) { Package (5) { 5, 0, 0, 0xFC, 1 } })   // own domain
#endif
  }
  Scope (\_SB.CPUS.C001) {
#ifdef SHARED
    Name (_PCT, Package (2) { ResourceTemplate () { Register (SystemIO, 8, 0, 0xE0) },
                              ResourceTemplate () { Register (SystemIO, 8, 0, 0xE0) } })
#else
    Name (_PCT, Package (2) { ResourceTemplate () { Register (SystemIO, 8, 0, 0xE1) },
                              ResourceTemplate () { Register (SystemIO, 8, 0, 0xE1) } })
#endif
    Method (_PSS) { Return (\_SB.PSSX) }
    Method (_PPC) { Return (\_SB.PPCV) }
#ifdef SHARED
    Name (_PSD, Package (1) { Package (5) { 5, 0, 0, 0xFC, 2 } })
#else
    Name (_PSD, Package (1) { Package (5) { 5, 0, 1, 0xFC, 1 } })
#endif
  }
  Scope (\_TZ) { ThermalZone (TZ00) {
    Method (_TMP, 0, Serialized) {                          // a _TMP read is also the "firmware event" for _PPC
      If (LNotEqual (\_SB.PLST, \_SB.PPCV)) { Store (\_SB.PPCV, \_SB.PLST)
        Notify (\_SB.CPUS.C000, 0x80) Notify (\_SB.CPUS.C001, 0x80) }
      Return (Add (2982, Multiply (\_SB.TOFF, 10))) }       // 25 C + byte 0xE2
    Method (_CRT) { Return (3832) }                         // 110 C
    Method (_PSV) { Return (3532) }                         // 80 C
    Name (_PSL, Package () { \_SB.CPUS.C000, \_SB.CPUS.C001 })
    Name (_TC1, 4) Name (_TC2, 3) Name (_TSP, 10) Name (_TZP, 10) } }
}
